"""Calls the compiled expand."""

import ctypes
from ctypes import c_int32, c_int64, c_void_p
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor

from kernels.adapters import AdapterTables, Segments
from kernels.cpu import tables
from kernels.cpu.launch import launch
from kernels.cpu.library import DTYPE_CODES, is_plain, vector_lanes


class _Expand(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("shrunk", "out", "adapters")),
        ("segments", tables.SegmentsStructure),
        *((name, c_void_p) for name in ("modules", "first_column")),
        *((name, c_int64) for name in ("num_modules", "layer", "num_tokens", "in_features", "max_lora_rank")),
        ("out_stride", c_int64),
        *((name, c_int32) for name in ("out_dtype", "lanes")),
    )


def supports(shrunk: Tensor, adapters: AdapterTables, segments: Segments, out: Tensor) -> bool:
    is_out = out.is_cpu and out.dtype in DTYPE_CODES and out.stride(1) == 1
    is_shrunk = is_plain(shrunk) and shrunk.dtype == torch.float32
    return is_out and is_shrunk and tables.supports(adapters, segments)


def lora_expand_cpu(
    shrunk: Tensor,
    adapters: AdapterTables,
    segments: Segments,
    layer: int,
    modules: tuple[int, ...],
    in_features: int,
    out_features: tuple[int, ...],
    out: Tensor,
) -> None:
    op = _Expand(
        shrunk.data_ptr(),
        out.data_ptr(),
        tables.address(adapters),
        tables.segments_structure(segments),
        tables.modules_address(modules),
        ctypes.addressof(_first_columns(out_features)),
        len(modules),
        layer,
        len(out),
        in_features,
        adapters.max_lora_rank,
        out.stride(0),
        DTYPE_CODES[out.dtype],
        vector_lanes(),
    )
    launch("lora_expand", op, out, shrunk, *tables.tensors(adapters, segments))


@cache
def _first_columns(out_features: tuple[int, ...]) -> "ctypes.Array[c_int64]":
    return (c_int64 * (len(out_features) + 1))(*accumulate(out_features, initial=0))
