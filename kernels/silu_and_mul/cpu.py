"""Calls the compiled gate."""

import torch
from torch import Tensor

from kernels.cpu.library import DTYPE_CODES, is_plain, kernel


def supports(gate_up: Tensor) -> bool:
    return gate_up.dim() == 2 and gate_up.shape[1] % 2 == 0 and is_plain(gate_up)


def silu_and_mul_cpu(gate_up: Tensor) -> Tensor:
    rows, intermediate = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, intermediate, dtype=gate_up.dtype)
    kernel("silu_and_mul")(
        gate_up.data_ptr(), out.data_ptr(), DTYPE_CODES[out.dtype], rows, intermediate, torch.get_num_threads()
    )
    return out
