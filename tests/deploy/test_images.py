"""What can be known of the Dockerfile and compose.yaml without a docker daemon."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from adapter_store.config import StoreConfig
from common.config import ServiceConfig
from gateway.config import GatewayConfig
from gpu_worker.config import WorkerConfig
from scheduler.config import SchedulerConfig
from tests.checkout import ROOT, read, tree_files

DOCKERFILE = "deploy/docker/Dockerfile"
CONFIGS: dict[str, type[ServiceConfig]] = {
    "gateway": GatewayConfig,
    "scheduler": SchedulerConfig,
    "adapter-store": StoreConfig,
    "worker": WorkerConfig,
}
TARGETS = {"control": ("gateway", "scheduler", "adapter_store"), "worker": ("gpu_worker",)}


def stages() -> dict[str, list[str]]:
    """Stage -> its instructions, in order."""
    found: dict[str, list[str]] = {}
    for line in read(DOCKERFILE).splitlines():
        if match := re.match(r"FROM \S+ AS (\w+)", line):
            lines = found.setdefault(match[1], [])
        elif line and not line.startswith("#") and found:
            lines.append(line)
    return found


def sources(stage: str) -> list[str]:
    """What the stage copies out of the tree, and from other stages, as paths of the tree."""
    return [
        source.removeprefix("/app/")
        for line in stages()[stage]
        if line.startswith("COPY")
        for source in line.split()[1:-1]
        if not source.startswith(("--", "/wheels"))
    ]


@pytest.mark.parametrize("stage", stages())
def test_everything_that_is_copied_exists(stage: str) -> None:
    assert [source for source in sources(stage) if not (ROOT / source).exists()] == []


@pytest.mark.parametrize("stage", stages())
def test_every_installation_is_constrained(stage: str) -> None:
    installs = [line for line in stages()[stage] if "pip install" in line]
    assert [line for line in installs if "-c constraints.txt" not in line] == []


@pytest.mark.parametrize("target", TARGETS)
def test_the_image_does_not_run_as_root(target: str) -> None:
    assert [line for line in stages()[target] if line.startswith("USER")] == ["USER 10001:10001"]


def test_the_control_image_has_no_torch() -> None:
    assert not re.search("torch|worker", "\n".join(stages()["control"]))


def test_libgomp_comes_from_the_distribution() -> None:
    assert [path for path in tree_files() if "gomp" in path.name] == []
    assert not [line for line in read(DOCKERFILE).splitlines() if line.startswith("COPY") and "gomp" in line]


@pytest.mark.parametrize("target", TARGETS)
def test_the_image_holds_what_its_services_import(target: str, tmp_path: Path) -> None:
    """The services answer --help in a folder that holds nothing but what the image copies."""
    base = [source for source in sources("base") if source != "pyproject.toml"]
    for source in [*base, *sources(target)]:
        (tmp_path / source).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / source).symlink_to(ROOT / source)
    for service in TARGETS[target]:
        code = f"import runpy; sys.argv = ['x', '--help']; runpy.run_module({service!r}, run_name='__main__')"
        result = run_in(tmp_path, code)
        assert result.returncode == 0, result.stderr


def run_in(folder: Path, code: str) -> "subprocess.CompletedProcess[str]":
    """Runs Python that finds our packages in `folder` alone; the client and its stubs are installed."""
    path = f"import sys; sys.path = ['.', *(place for place in sys.path if place != {str(ROOT)!r})]; "
    command = [sys.executable, "-P", "-c", path + code]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)


def test_a_module_that_is_not_copied_is_missed(tmp_path: Path) -> None:
    (tmp_path / "gateway").symlink_to(ROOT / "gateway")
    assert "No module named 'common'" in run_in(tmp_path, "import gateway.service").stderr


def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(read("compose.yaml"))["services"]
    return found


@pytest.mark.parametrize("service", CONFIGS)
def test_compose_sets_only_options_that_exist(service: str) -> None:
    known = {f"LORAPLEX_{name.upper()}" for name in vars(CONFIGS[service])["__dataclass_fields__"]}
    assert set(services()[service]["environment"]) <= known


@pytest.mark.parametrize("service", CONFIGS)
def test_compose_runs_it_without_privileges(service: str) -> None:
    options = services()[service]
    assert (options["read_only"], options["user"], options["cap_drop"]) == (True, "10001:10001", ["ALL"])


@pytest.mark.parametrize("service", CONFIGS)
def test_compose_dials_services_that_it_starts(service: str) -> None:
    environment = services()[service]["environment"]
    dialled = [environment[name] for name in ("LORAPLEX_SCHEDULER", "LORAPLEX_ADAPTER_STORE") if name in environment]
    for address in dialled:
        name, port = address.split(":")
        assert services()[name]["environment"]["LORAPLEX_PORT"] == port
