"""Calls the compiled shrink."""

import ctypes
from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from kernels.adapters import AdapterTables, Segments
from kernels.cpu import tables
from kernels.cpu.launch import launch, settle
from kernels.cpu.library import is_plain, vector_lanes


class _Shrink(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("x", "out", "adapters")),
        ("segments", tables.SegmentsStructure),
        ("modules", c_void_p),
        *((name, c_int64) for name in ("num_modules", "layer", "num_tokens", "in_features", "max_lora_rank")),
        ("lanes", c_int64),
    )


def supports(x: Tensor, adapters: AdapterTables, segments: Segments) -> bool:
    return is_plain(x) and tables.supports(adapters, segments)


def lora_shrink_cpu(
    x: Tensor, adapters: AdapterTables, segments: Segments, layer: int, modules: tuple[int, ...]
) -> Tensor:
    if x.dtype != torch.float32:
        settle()
    x = x.to(torch.float32)
    num_tokens, in_features = x.shape
    out = torch.zeros(len(modules), num_tokens, adapters.max_lora_rank, dtype=torch.float32)
    op = _Shrink(
        x.data_ptr(),
        out.data_ptr(),
        tables.address(adapters),
        tables.segments_structure(segments),
        tables.modules_address(modules),
        len(modules),
        layer,
        num_tokens,
        in_features,
        adapters.max_lora_rank,
        vector_lanes(),
    )
    launch("lora_shrink", op, out, x, *tables.tensors(adapters, segments), reads=x)
    return out
