"""Reading rows of a packed adapter through its page table, for the reference operations."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.adapters import ADAPTER_DTYPES, UNIT_BYTES, AdapterTables, Segments


@dataclass(frozen=True, slots=True)
class SegmentModules:
    """One segment with an adapter and what that adapter changes in the layer; tuples follow the call's modules."""

    start: int
    end: int
    adapter: int
    dtype: torch.dtype
    start_unit: tuple[int, ...]
    lora_rank: tuple[int, ...]
    scaling: tuple[float, ...]


def segment_modules(
    adapters: AdapterTables, segments: Segments, layer: int, modules: tuple[int, ...]
) -> list[SegmentModules]:
    """The segments that have tokens and an adapter with at least one of the modules in this layer."""
    starts, rows = segments.starts.tolist(), segments.adapter.tolist()
    used = segments.adapter.clamp(min=0).to(torch.int64)
    table = [values[used, layer].tolist() for values in (adapters.start_unit, adapters.lora_rank, adapters.scaling)]
    found = []
    for segment, (adapter, dtype) in enumerate(zip(rows, adapters.dtype[used].tolist(), strict=True)):
        start, end = starts[segment], starts[segment + 1]
        units, ranks, scalings = ([values[segment][module] for module in modules] for values in table)
        if adapter >= 0 and end > start and any(ranks):
            found.append(
                SegmentModules(start, end, adapter, ADAPTER_DTYPES[dtype], tuple(units), tuple(ranks), tuple(scalings))
            )
    return found


def row_units(features: int, dtype: torch.dtype) -> int:
    """Units of 128 bytes that one row takes."""
    return -(-features * dtype.itemsize // UNIT_BYTES)


def read_rows(
    adapters: AdapterTables, adapter: int, start_unit: int, num_rows: int, features: int, dtype: torch.dtype
) -> Tensor:
    """`[num_rows, features]` of the adapter's byte string from start_unit on.

    A view of the pool when the rows lie in one page, a copy of just these bytes when they cross into the next.
    """
    page_bytes = adapters.pool.shape[1]
    first = start_unit * UNIT_BYTES
    end = first + num_rows * row_units(features, dtype) * UNIT_BYTES
    first_page, end_page = first // page_bytes, -(-end // page_bytes)
    pieces = [
        adapters.pool[page, max(first - index * page_bytes, 0) : min(end - index * page_bytes, page_bytes)]
        for index, page in enumerate(adapters.page_table[adapter, first_page:end_page].tolist(), start=first_page)
    ]
    rows = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return rows.view(dtype).view(num_rows, -1)[:, :features]
