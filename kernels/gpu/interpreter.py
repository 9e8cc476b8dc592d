"""Triton's interpreter with the bfloat16 of a GPU.

The interpreter keeps bfloat16 as 16-bit integers. As it comes, it cuts a float32 off instead of rounding it to the
nearest, and multiplies the integers in `tl.dot`; both are mended here, for triton 3.6 to 3.9.
"""

from typing import Any

import torch
import triton.language as tl
from triton.runtime import interpreter


def mend() -> None:
    """Once a process, before a kernel runs in the interpreter."""
    builder = interpreter.InterpreterBuilder
    convert, multiply = builder.cast_impl, builder.create_dot

    def cast_impl(self: Any, source: Any, dtype: Any) -> Any:
        kinds = source.dtype.scalar, dtype.scalar
        if kinds == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle(_widened(source.data), tl.float32)
        if kinds == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(_rounded(source.data), tl.bfloat16)
        return convert(self, source, dtype)

    def create_dot(self: Any, left: Any, right: Any, total: Any, *options: Any) -> Any:
        wide = [
            interpreter.TensorHandle(_widened(side.data), tl.float32) if side.dtype.scalar == tl.bfloat16 else side
            for side in (left, right)
        ]
        return multiply(self, *wide, total, *options)

    builder.cast_impl = cast_impl
    builder.create_dot = create_dot


def _widened(bits: Any) -> Any:
    return (bits.astype("uint32") << 16).view("float32")


def _rounded(values: Any) -> Any:
    """To the nearest, ties to even, as `cvt.rn.bf16.f32`."""
    return torch.tensor(values).to(torch.bfloat16).view(torch.uint16).numpy()
