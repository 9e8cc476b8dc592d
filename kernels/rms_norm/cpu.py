"""Calls the compiled normalisation."""

import torch
from torch import Tensor

from kernels.cpu.library import DTYPE_CODES, is_plain, kernel


def supports(x: Tensor, weight: Tensor, residual: Tensor | None) -> bool:
    same = weight.dtype == x.dtype and (residual is None or residual.dtype == x.dtype)
    return same and x.dim() == 2 and is_plain(x, weight, residual)


def rms_norm_cpu(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    rows, hidden = x.shape
    out = torch.empty_like(x)
    total = None if residual is None else torch.empty_like(x)
    kernel("rms_norm")(
        x.data_ptr(),
        None if residual is None else residual.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        None if total is None else total.data_ptr(),
        DTYPE_CODES[x.dtype],
        rows,
        hidden,
        eps,
        torch.get_num_threads(),
    )
    return out, x if total is None else total
