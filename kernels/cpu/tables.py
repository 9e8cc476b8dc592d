"""AdapterTables as the compiled kernels read them."""

import ctypes
from ctypes import c_int64, c_void_p

from kernels.adapters import AdapterTables, Segments


class _Adapters(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("pool", "page_table", "start_unit", "lora_rank", "scaling", "dtype")),
        *((name, c_int64) for name in ("page_bytes", "max_pages", "num_layers")),
    )


# The last tables and their structure: all calls of a step share one, and to build it costs as much as a call.
_last: tuple[AdapterTables, _Adapters] | None = None


def supports(adapters: AdapterTables, segments: Segments) -> bool:
    tables = (adapters.pool, adapters.page_table, adapters.start_unit, adapters.lora_rank, adapters.scaling)
    return adapters.pool.is_cpu and all(
        table.is_contiguous() for table in (*tables, adapters.dtype, segments.starts, segments.adapter)
    )


def address(adapters: AdapterTables) -> int:
    """Of the C structure; it lives until the next call with other tables."""
    global _last
    if _last is None or _last[0] is not adapters:
        structure = _Adapters(
            adapters.pool.data_ptr(),
            adapters.page_table.data_ptr(),
            adapters.start_unit.data_ptr(),
            adapters.lora_rank.data_ptr(),
            adapters.scaling.data_ptr(),
            adapters.dtype.data_ptr(),
            adapters.pool.shape[1],
            adapters.page_table.shape[1],
            adapters.lora_rank.shape[1],
        )
        _last = adapters, structure
    return ctypes.addressof(_last[1])
