"""What the control services are made of, read from the running processes."""

import re
from pathlib import Path

import pytest

from loraplex.fleet import Fleet
from tests.e2e.support import processes

MAX_RSS_KIB = 150 * 1000 * 1000 // 1024


def resident_kib(pid: int) -> int:
    match = re.search(r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert match
    return int(match[1])


def loads_library(pid: int, name: str) -> bool:
    return name in Path(f"/proc/{pid}/maps").read_text()


def holds_module(pid: int, package: str) -> bool:
    """The path of an imported package's __init__ is a string in the memory of the process that imported it."""
    needle = f"site-packages/{package}/__init__.py".encode()
    with Path(f"/proc/{pid}/mem").open("rb", 0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            (
                bounds,
                permissions,
                *_,
            ) = line.split()
            if not permissions.startswith("rw") or "[v" in line:
                continue
            start, end = (int(bound, 16) for bound in bounds.split("-"))
            memory.seek(start)
            if needle in memory.read(end - start):
                return True
    return False


@pytest.mark.parametrize("service", ["gateway", "scheduler", "adapter_store"])
def test_a_control_service_has_no_torch_and_no_transformers_loaded(fleet: Fleet, service: str) -> None:
    pid = processes(fleet)[service]
    assert not loads_library(pid, "libtorch")
    assert not holds_module(pid, "torch")
    assert not holds_module(pid, "transformers")


@pytest.mark.parametrize("service", ["gateway", "scheduler", "adapter_store"])
def test_a_control_service_stays_below_150_mb(fleet: Fleet, service: str) -> None:
    assert resident_kib(processes(fleet)[service]) < MAX_RSS_KIB


def test_the_detector_sees_what_a_process_has_imported(fleet: Fleet) -> None:
    gateway = processes(fleet)["gateway"]
    assert loads_library(gateway, "tokenizers")
    assert holds_module(gateway, "tokenizers")
