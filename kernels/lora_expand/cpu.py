"""Calls the compiled expand."""

from ctypes import c_int32, c_int64
from itertools import accumulate

import torch
from torch import Tensor

from kernels.adapters import AdapterTables, Segments
from kernels.cpu import tables
from kernels.cpu.library import DTYPE_CODES, is_plain, kernel


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
    count = len(modules)
    kernel("lora_expand")(
        shrunk.data_ptr(),
        tables.address(adapters),
        segments.starts.data_ptr(),
        segments.adapter.data_ptr(),
        len(segments.adapter),
        layer,
        (c_int32 * count)(*modules),
        count,
        (c_int64 * (count + 1))(*accumulate(out_features, initial=0)),
        out.data_ptr(),
        DTYPE_CODES[out.dtype],
        out.stride(0),
        len(out),
        in_features,
        adapters.max_lora_rank,
        torch.get_num_threads(),
    )
