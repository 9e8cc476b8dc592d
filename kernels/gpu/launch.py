"""A kernel launch as a value: run on a device or in the interpreter, or compiled ahead of time for another machine."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

if os.environ.get("TRITON_INTERPRET") == "1":
    from kernels.gpu import interpreter

    interpreter.mend()

# A pointer, an integer, a float; None = the kernel does not use this pointer.
Argument = Tensor | int | float | None


@dataclass(frozen=True, slots=True)
class Launch:
    """`kernel` is a `triton.jit` function; `constants` are its `tl.constexpr` parameters."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Argument]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2

    def run(self) -> None:
        """Enqueues the kernel on the current stream; nothing to do when the grid is empty."""
        if all(self.grid):
            options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
            self.kernel[self.grid](**self.arguments, **self.constants, **options)


def run_all(launches: Sequence[Launch]) -> None:
    for launch in launches:
        launch.run()


def ceil_div(amount: int, size: int) -> int:
    return -(-amount // size)


def next_power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
