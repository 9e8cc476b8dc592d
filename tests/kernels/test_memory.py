"""Memory that a step freed is there for the next, and large tensors ask for large pages."""

import subprocess
import sys

import torch

from kernels.cpu.memory import prefer_huge_pages

# Page faults of ten steps that each write twelve tensors of 8 MiB and then free them; two more before, to warm up.
FAULTS = """
import resource, sys
import torch
from kernels.cpu.memory import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def write(times):
    for _ in range(times):
        held = [torch.empty(1 << 23, dtype=torch.uint8).fill_(1) for _ in range(12)]
        del held
write(2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
write(10)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(how: str) -> int:
    command = [sys.executable, "-c", FAULTS, how]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_what_was_freed_is_not_asked_for_again() -> None:
    # 4 KiB each: 24,576 a step where everything goes back to the system.
    assert _faults("keep") < 1000 < _faults("as it comes")


def _flags(address: int) -> list[str]:
    """Of the mapping that the address is in, from proc(5), smaps."""
    inside = False
    with open("/proc/self/smaps") as file:
        for line in file:
            first, _, rest = line.partition(" ")
            if "-" in first and rest:
                low, high = (int(part, 16) for part in first.split("-"))
                inside = low <= address < high
            elif inside and first == "VmFlags:":
                return rest.split()
    raise AssertionError("the address is in no mapping")


def test_a_large_tensor_asks_for_huge_pages_and_a_small_one_is_left_alone() -> None:
    large, plain = torch.empty(2, 1 << 26, dtype=torch.uint8).unbind()
    assert "hg" not in _flags(large.data_ptr() + large.nbytes // 2)
    assert prefer_huge_pages(large)
    assert "hg" in _flags(large.data_ptr() + large.nbytes // 2)
    assert "hg" not in _flags(plain.data_ptr() + plain.nbytes // 2)
    assert not prefer_huge_pages(torch.empty(16, dtype=torch.uint8))
