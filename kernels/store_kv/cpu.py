"""Calls the compiled rotation and store."""

import ctypes
from ctypes import c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from kernels.cpu.launch import launch
from kernels.cpu.library import DTYPE_CODES, has_dtype


class _Heads(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("heads", c_int64), ("token_stride", c_int64), ("head_stride", c_int64))


class _StoreKv(ctypes.Structure):
    _fields_ = (
        ("query", _Heads),
        ("key", _Heads),
        ("value", _Heads),
        *((name, c_void_p) for name in ("rotated", "pages", "cos_sin", "positions", "slots")),
        *((name, c_int64) for name in ("num_tokens", "head_dim", "page_size")),
        *((name, c_int64) for name in ("page_stride", "value_offset", "slot_stride", "head_stride")),
        ("x_dtype", c_int32),
        ("page_dtype", c_int32),
    )


def supports(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    kv_pages: Tensor,
    slot_mapping: Tensor,
) -> bool:
    heads = (query, key, value)
    return (
        all(tensor.is_cpu and tensor.stride(2) == 1 and tensor.dtype == query.dtype for tensor in heads)
        and query.dtype in DTYPE_CODES
        and kv_pages.dtype in DTYPE_CODES
        and kv_pages.is_cpu
        and kv_pages.stride(5) == 1
        and has_dtype(torch.float32, cos_sin)
        and has_dtype(torch.int64, positions, slot_mapping)
    )


def store_kv_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    kv_pages: Tensor,
    slot_mapping: Tensor,
    layer: int,
) -> Tensor:
    rotated = torch.empty(query.shape, dtype=query.dtype)
    page_stride, layer_stride, *strides = kv_pages.stride()[:5]
    op = _StoreKv(
        _heads(query),
        _heads(key),
        _heads(value),
        rotated.data_ptr(),
        kv_pages.data_ptr() + layer * layer_stride * kv_pages.itemsize,
        cos_sin.data_ptr(),
        positions.data_ptr(),
        slot_mapping.data_ptr(),
        len(query),
        query.shape[2],
        kv_pages.shape[3],
        page_stride,
        *strides,
        DTYPE_CODES[query.dtype],
        DTYPE_CODES[kv_pages.dtype],
    )
    launch("store_kv", op, rotated, query, key, value, cos_sin, positions, kv_pages, slot_mapping)
    return rotated


def _heads(tensor: Tensor) -> _Heads:
    return _Heads(tensor.data_ptr(), tensor.shape[1], tensor.stride(0), tensor.stride(1))
