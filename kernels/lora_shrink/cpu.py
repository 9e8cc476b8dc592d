"""Calls the compiled shrink."""

from ctypes import c_int32

import torch
from torch import Tensor

from kernels.adapters import AdapterTables, Segments
from kernels.cpu import tables
from kernels.cpu.library import is_plain, kernel


def supports(x: Tensor, adapters: AdapterTables, segments: Segments) -> bool:
    return is_plain(x) and tables.supports(adapters, segments)


def lora_shrink_cpu(
    x: Tensor, adapters: AdapterTables, segments: Segments, layer: int, modules: tuple[int, ...]
) -> Tensor:
    x = x.to(torch.float32)
    num_tokens, in_features = x.shape
    out = torch.zeros(len(modules), num_tokens, adapters.max_lora_rank, dtype=torch.float32)
    kernel("lora_shrink")(
        x.data_ptr(),
        tables.address(adapters),
        segments.starts.data_ptr(),
        segments.adapter.data_ptr(),
        len(segments.adapter),
        layer,
        (c_int32 * len(modules))(*modules),
        len(modules),
        out.data_ptr(),
        num_tokens,
        in_features,
        adapters.max_lora_rank,
        torch.get_num_threads(),
    )
    return out
