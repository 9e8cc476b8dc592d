"""The Triton gate: a block of one row a program."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import Argument, Launch, ceil_div, next_power_of_two, run_all

MAX_BLOCK = 1024


@triton.jit
def silu_and_mul_kernel(gate_up, out, intermediate, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < intermediate
    at = gate_up + row * 2 * intermediate + column
    gate = tl.load(at, mask=mask, other=0.0)
    up = tl.load(at + intermediate, mask=mask, other=0.0)
    wide = gate.to(tl.float32)
    # rounded after silu and after the product, as transformers does
    active = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    tl.store(out + row * intermediate + column, (active * up.to(tl.float32)).to(gate.dtype), mask=mask)


def launches(gate_up: Tensor) -> tuple[Tensor, list[Launch]]:
    """The result, and what computes it."""
    gate_up = gate_up.contiguous()
    rows, intermediate = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, intermediate, dtype=gate_up.dtype, device=gate_up.device)
    block = min(MAX_BLOCK, next_power_of_two(intermediate))
    arguments: dict[str, Argument] = {"gate_up": gate_up, "out": out, "intermediate": intermediate}
    return out, [Launch(silu_and_mul_kernel, (rows, ceil_div(intermediate, block)), arguments, {"BLOCK": block})]


def silu_and_mul_triton(gate_up: Tensor) -> Tensor:
    out, work = launches(gate_up)
    run_all(work)
    return out
