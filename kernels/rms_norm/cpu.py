"""Calls the compiled normalisation."""

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from kernels.cpu.launch import launch
from kernels.cpu.library import DTYPE_CODES, is_plain


class _RmsNorm(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("x", "residual", "weight", "out", "total")),
        *((name, c_int64) for name in ("rows", "hidden")),
        ("eps", c_float),
        ("dtype", c_int32),
    )


def supports(x: Tensor, weight: Tensor, residual: Tensor | None) -> bool:
    same = weight.dtype == x.dtype and (residual is None or residual.dtype == x.dtype)
    return same and x.dim() == 2 and is_plain(x, weight, residual)


def rms_norm_cpu(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    rows, hidden = x.shape
    out = torch.empty_like(x)
    total = None if residual is None else torch.empty_like(x)
    op = _RmsNorm(
        x.data_ptr(),
        None if residual is None else residual.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        None if total is None else total.data_ptr(),
        rows,
        hidden,
        eps,
        DTYPE_CODES[x.dtype],
    )
    launch("rms_norm", op, out, total, x, residual)
    return out, x if total is None else total
