"""Calls the compiled gate."""

import ctypes
from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from kernels.cpu.launch import launch
from kernels.cpu.library import DTYPE_CODES, is_plain


class _SiluAndMul(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("gate_up", "out")),
        *((name, c_int64) for name in ("rows", "intermediate", "dtype")),
    )


def supports(gate_up: Tensor) -> bool:
    return gate_up.dim() == 2 and gate_up.shape[1] % 2 == 0 and is_plain(gate_up)


def silu_and_mul_cpu(gate_up: Tensor) -> Tensor:
    rows, intermediate = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, intermediate, dtype=gate_up.dtype)
    op = _SiluAndMul(gate_up.data_ptr(), out.data_ptr(), rows, intermediate, DTYPE_CODES[out.dtype])
    launch("silu_and_mul", op, out, gate_up)
    return out
