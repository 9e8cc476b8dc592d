"""Memory that a step freed is there for the next."""

import subprocess
import sys

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
