"""The Triton product for `deterministic`: one tile and one order of the sum, whatever the number of rows.

cuBLAS is faster and takes another kernel for another number of rows, so it serves everything else.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu import tiles
from kernels.gpu.device import narrow_dot
from kernels.gpu.launch import Argument, Launch, ceil_div, run_all


@triton.jit(do_not_specialize=["rows"])
def linear_kernel(
    x, weight, bias, out, rows, in_features, out_features,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x `[rows, in_features]`, weight `[out_features, in_features]`, out `[rows, out_features]`, all contiguous."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = row < rows
    is_column = column < out_features
    left = x + row.to(tl.int64)[:, None] * in_features
    right = weight + column.to(tl.int64)[:, None] * in_features
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, in_features, BLOCK_K):
        feature = start + tl.arange(0, BLOCK_K)
        is_feature = (feature < in_features)[None, :]
        a = tl.load(left + feature[None, :], mask=is_row[:, None] & is_feature, other=0.0)
        b = tl.load(right + feature[None, :], mask=is_column[:, None] & is_feature, other=0.0)
        total = narrow_dot(a, tl.trans(b), total)
    if HAS_BIAS:
        total += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    at = out + row.to(tl.int64)[:, None] * out_features + column[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


def launches(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, list[Launch]]:
    """The result, and what computes it."""
    x, (rows, in_features), out_features = x.contiguous(), x.shape, len(weight)
    out = torch.empty(rows, out_features, dtype=x.dtype, device=x.device)
    tile = tiles.choose("linear", tiles.DECODE, x.device)
    arguments: dict[str, Argument] = {"x": x, "weight": weight, "bias": weight if bias is None else bias, "out": out}
    arguments |= {"rows": rows, "in_features": in_features, "out_features": out_features}
    blocks = {name: tile[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")}
    grid = ceil_div(rows, tile["BLOCK_M"]), ceil_div(out_features, tile["BLOCK_N"])
    constants = {"HAS_BIAS": bias is not None} | blocks
    return out, [Launch(linear_kernel, grid, arguments, constants, tile["num_warps"], tile["num_stages"])]


def linear_triton(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out, work = launches(x, weight, bias)
    run_all(work)
    return out
