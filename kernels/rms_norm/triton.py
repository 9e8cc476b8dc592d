"""The Triton normalisation: a few whole rows a program."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import Argument, Launch, ceil_div, next_power_of_two, run_all

# Elements that a program holds at least: narrow rows (the heads of a batch) share one.
PROGRAM_ELEMENTS = 2048


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_kernel(
    x, residual, weight, out, total, num_rows, hidden, eps,
    HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All tensors contiguous; `residual` is read and `total` written only when HAS_RESIDUAL."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    is_column = column < hidden
    mask = (row < num_rows)[:, None] & is_column[None, :]
    at = row.to(tl.int64)[:, None] * hidden + column[None, :]
    value = tl.load(x + at, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        value = (value.to(tl.float32) + tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)).to(value.dtype)
        tl.store(total + at, value, mask=mask)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 1) / hidden + eps)
    normed = (wide * scale[:, None]).to(value.dtype).to(tl.float32)
    gain = tl.load(weight + column, mask=is_column, other=0.0).to(tl.float32)
    tl.store(out + at, (gain[None, :] * normed).to(value.dtype), mask=mask)


def launches(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor, list[Launch]]:
    """(normed, x + residual, what computes them)."""
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    num_rows, hidden = x.shape
    out, total = torch.empty_like(x), x if residual is None else torch.empty_like(x)
    block = next_power_of_two(hidden)
    rows = max(1, PROGRAM_ELEMENTS // block)
    arguments: dict[str, Argument] = {"x": x, "residual": x if residual is None else residual, "weight": weight}
    arguments |= {"out": out, "total": total, "num_rows": num_rows, "hidden": hidden, "eps": eps}
    norm = Launch(
        rms_norm_kernel,
        (ceil_div(num_rows, rows),),
        arguments,
        {"HAS_RESIDUAL": residual is not None, "ROWS": rows, "BLOCK": block},
        num_warps=max(4, min(16, block // 1024)),
    )
    return out, total, [norm]


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    out, total, work = launches(x, weight, eps, residual)
    run_all(work)
    return out, total
