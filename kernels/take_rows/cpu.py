"""Calls the compiled copy of rows."""

import ctypes
from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from kernels.cpu.launch import launch
from kernels.cpu.library import has_dtype, is_plain
from kernels.linear.packed import PANEL, PackedWeight


class _TakeRows(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("source", "rows", "out")),
        *((name, c_int64) for name in ("count", "source_rows", "width", "panel", "element_bytes")),
    )


def supports(source: Tensor | PackedWeight, rows: Tensor) -> bool:
    matrix, _, _ = _layout(source)
    is_matrix = isinstance(source, PackedWeight) or matrix.dim() == 2
    return is_matrix and is_plain(matrix) and rows.dim() == 1 and has_dtype(torch.int64, rows)


def take_rows_cpu(source: Tensor | PackedWeight, rows: Tensor) -> Tensor:
    matrix, panel, source_rows = _layout(source)
    width = matrix.shape[1]
    out = torch.empty(len(rows), width, dtype=matrix.dtype)
    sizes = len(rows), source_rows, width, panel, matrix.itemsize
    op = _TakeRows(matrix.data_ptr(), rows.data_ptr(), out.data_ptr(), *sizes)
    launch("take_rows", op, out, matrix, rows, reads=matrix)
    return out


def _layout(source: Tensor | PackedWeight) -> tuple[Tensor, int, int]:
    """Its numbers, how many rows lie side by side, and how many rows there are."""
    if isinstance(source, PackedWeight):
        return source.panels, PANEL, source.out_features
    return source, 1, len(source)
