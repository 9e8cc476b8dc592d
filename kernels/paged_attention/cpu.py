"""Calls the compiled attention."""

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from kernels.cpu.launch import launch
from kernels.cpu.library import DTYPE_CODES, has_dtype, is_plain


class _Attention(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("query", "out", "pages", "page_table", "query_start", "context_lens")),
        *((name, c_int64) for name in ("num_sequences", "max_pages", "num_heads", "num_kv_heads", "head_dim")),
        *((name, c_int64) for name in ("page_size", "page_stride", "value_offset", "slot_stride", "head_stride")),
        ("sliding_window", c_int64),
        ("scale", c_float),
        ("query_dtype", c_int32),
        ("page_dtype", c_int32),
    )


def supports(query: Tensor, kv_pages: Tensor, page_table: Tensor, query_start: Tensor, context_lens: Tensor) -> bool:
    is_readable = kv_pages.is_cpu and kv_pages.dtype in DTYPE_CODES and kv_pages.stride(5) == 1
    return is_readable and is_plain(query) and has_dtype(torch.int32, page_table, query_start, context_lens)


def paged_attention_cpu(
    query: Tensor,
    kv_pages: Tensor,
    page_table: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    layer: int,
    scale: float,
    sliding_window: int,
) -> Tensor:
    out = torch.empty_like(query)
    page_stride, layer_stride, *strides = kv_pages.stride()[:5]
    op = _Attention(
        query.data_ptr(),
        out.data_ptr(),
        kv_pages.data_ptr() + layer * layer_stride * kv_pages.itemsize,
        page_table.data_ptr(),
        query_start.data_ptr(),
        context_lens.data_ptr(),
        *page_table.shape,
        query.shape[1],
        kv_pages.shape[4],
        query.shape[2],
        kv_pages.shape[3],
        page_stride,
        *strides,
        sliding_window,
        scale,
        DTYPE_CODES[query.dtype],
        DTYPE_CODES[kv_pages.dtype],
    )
    launch("paged_attention", op, out, query, kv_pages, page_table, query_start, context_lens)
    return out
