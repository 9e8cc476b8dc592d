"""AdapterTables and Segments as the Triton kernels take them."""

import torch

from kernels.adapters import UNIT_BYTES, AdapterTables, Segments
from kernels.gpu.launch import Argument, ceil_div

MAX_MODULES = 3

# Integers that change from step to step or from layer to layer: one compiled kernel is for all of them.
VARYING = (
    *("num_segments", "table_stride", "adapter_stride", "layer_offset", "width", "num_tokens"),
    *("module_0", "module_1", "module_2"),
)


def lora_arguments(
    adapters: AdapterTables, segments: Segments, layer: int, modules: tuple[int, ...]
) -> dict[str, Argument]:
    """What `lora_shrink` and `lora_expand` have in common. The pool goes in once for each element type."""
    if not 1 <= len(modules) <= MAX_MODULES:
        raise ValueError(f"{len(modules)} modules in one launch; 1 to {MAX_MODULES} share an input")
    num_modules = adapters.lora_rank.shape[2]
    return {
        "starts": segments.starts,
        "segment_adapter": segments.adapter,
        "num_segments": len(segments.adapter),
        "pool_f32": adapters.pool.view(torch.float32),
        "pool_bf16": adapters.pool.view(torch.bfloat16),
        "pool_f16": adapters.pool.view(torch.float16),
        "page_stride": adapters.pool.stride(0) // UNIT_BYTES,
        "page_units": adapters.pool.shape[1] // UNIT_BYTES,
        "page_table": adapters.page_table,
        "table_stride": adapters.page_table.stride(0),
        "start_unit": adapters.start_unit,
        "lora_rank": adapters.lora_rank,
        "adapter_dtype": adapters.dtype,
        "adapter_stride": adapters.lora_rank.shape[1] * num_modules,
        "layer_offset": layer * num_modules,
        "width": adapters.max_lora_rank,
        **{f"module_{index}": modules[min(index, len(modules) - 1)] for index in range(MAX_MODULES)},
    }


def num_tiles(num_rows: int, num_runs: int, block: int) -> int:
    """Programs that are enough for any division of `num_rows` into `num_runs`; see `device.find_run`."""
    return num_rows // block + num_runs


def units_of(features: int, itemsize: int) -> int:
    return ceil_div(features * itemsize, UNIT_BYTES)
