"""AdapterTables as the compiled kernels read them."""

import ctypes
from ctypes import c_int32, c_int64, c_void_p
from functools import cache

import torch

from kernels.adapters import AdapterTables, Segments
from kernels.cpu.library import has_dtype


class _Adapters(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("pool", "page_table", "start_unit", "lora_rank", "scaling", "dtype")),
        *((name, c_int64) for name in ("page_bytes", "max_pages", "num_layers")),
    )


class SegmentsStructure(ctypes.Structure):
    _fields_ = (("starts", c_void_p), ("adapter", c_void_p), ("count", c_int64))


# The last tables and their structure, None when they cannot be read so: all calls of a step share one, and to build it
# costs as much as a call.
_last: tuple[AdapterTables, _Adapters | None] | None = None


def _structure(adapters: AdapterTables) -> _Adapters | None:
    global _last
    if _last is None or _last[0] is not adapters:
        _last = adapters, _build(adapters)
    return _last[1]


def _build(adapters: AdapterTables) -> _Adapters | None:
    indices = adapters.page_table, adapters.start_unit, adapters.lora_rank
    is_readable = (
        has_dtype(torch.uint8, adapters.pool)
        and has_dtype(torch.int32, *indices, adapters.dtype)
        and has_dtype(torch.float32, adapters.scaling)
    )
    if not is_readable:
        return None
    tables = (adapters.pool, *indices, adapters.scaling, adapters.dtype)
    sizes = adapters.pool.shape[1], adapters.page_table.shape[1], adapters.lora_rank.shape[1]
    return _Adapters(*(table.data_ptr() for table in tables), *sizes)


def supports(adapters: AdapterTables, segments: Segments) -> bool:
    return has_dtype(torch.int32, segments.starts, segments.adapter) and _structure(adapters) is not None


def address(adapters: AdapterTables) -> int:
    """Of the C structure, after `supports` has said yes; it lives until other tables come."""
    structure = _structure(adapters)
    if structure is None:
        raise ValueError("these tables are not for the compiled kernels")
    return ctypes.addressof(structure)


def segments_structure(segments: Segments) -> SegmentsStructure:
    return SegmentsStructure(segments.starts.data_ptr(), segments.adapter.data_ptr(), len(segments.adapter))


def modules_address(modules: tuple[int, ...]) -> int:
    return ctypes.addressof(_modules(modules))


@cache
def _modules(modules: tuple[int, ...]) -> "ctypes.Array[c_int32]":
    return (c_int32 * len(modules))(*modules)


def tensors(adapters: AdapterTables, segments: Segments) -> tuple[object, ...]:
    """What must live as long as an address is used."""
    return adapters, _structure(adapters), segments.starts, segments.adapter
