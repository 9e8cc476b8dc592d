"""Calls the compiled product."""

import ctypes
from ctypes import c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from kernels.cpu.launch import launch, settle
from kernels.cpu.library import DTYPE_CODES, is_plain, vector_lanes
from kernels.linear.packed import PackedWeight

WEIGHT_DTYPES = (torch.float32, torch.bfloat16)


class _Linear(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("x", "weight", "bias", "out")),
        *((name, c_int64) for name in ("rows", "in_features", "out_features")),
        ("weight_dtype", c_int32),
        ("lanes", c_int32),
    )


def supports(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> bool:
    fits = x.dim() == 2 and x.shape[1] == weight.panels.shape[1]
    return fits and weight.dtype in WEIGHT_DTYPES and is_plain(x, weight.panels, bias)


def linear_cpu(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    is_wide = x.dtype == torch.float32
    if not is_wide:
        settle()
    wide = x.to(torch.float32)
    wide_bias = None if bias is None else bias.to(torch.float32)
    rows, in_features = x.shape
    out = torch.empty(rows, weight.out_features, dtype=torch.float32)
    op = _Linear(
        wide.data_ptr(),
        weight.panels.data_ptr(),
        None if wide_bias is None else wide_bias.data_ptr(),
        out.data_ptr(),
        rows,
        in_features,
        weight.out_features,
        DTYPE_CODES[weight.dtype],
        vector_lanes(),
    )
    launch("linear", op, out, wide, wide_bias)
    if is_wide:
        return out
    settle()
    return out.to(x.dtype)
