"""What every test shares: repeatable hypothesis, one torch thread, and no skipped test in CI."""

import os
import shutil
import subprocess
import sys
from collections.abc import Generator
from typing import TypeVar

# Before anything imports torch; the services a test starts inherit it. Two pytest processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before anything imports grpc: tests start processes while they hold channels, and none of these uses the parent's.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
# Tests of two threads: one that waits must not keep a core from the one it waits for.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
from hypothesis import settings

settings.register_profile("loraplex", deadline=None, derandomize=True, database=None)
settings.load_profile("loraplex")

_Report = TypeVar("_Report", pytest.TestReport, pytest.CollectReport)


def pytest_report_header() -> str:
    """Which Redis the registry's contract is held against."""
    program = shutil.which("redis-server")
    if program is None:
        return "redis-server: none on the PATH"
    return subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout.strip()


def pytest_runtest_setup() -> None:
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return _fail_if_skipped_in_ci((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return _fail_if_skipped_in_ci((yield))


def _fail_if_skipped_in_ci(report: _Report) -> _Report:
    """A test that CI leaves out unseen proves nothing; one that cannot run there is deselected by a marker."""
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("CI"):
        report.outcome = "failed"
        report.longrepr = f"skipped although CI is set: {report.longrepr}"
    return report
