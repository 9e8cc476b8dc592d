"""Needs the environment of `make test-chart`, where nothing collected is a failure; `make test` has another."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("helm_python") else ["test_*.py"]
