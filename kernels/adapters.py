"""What the LoRA operations share: where the adapters of a batch lie in the page pool, and which tokens use which."""

from dataclasses import dataclass

import torch
from torch import Tensor

UNIT_BYTES = 128

# AdapterTables.dtype holds indices into this.
ADAPTER_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class AdapterTables:
    """The adapters of a batch; an adapter is one byte string cut into pages.

    In the string each present (layer, module) has `lora_rank` rows of A `[in_features]`, then `lora_rank` rows of B
    transposed `[out_features]`, every row padded to whole units of 128 bytes. Modules are numbered q, k, v, o, gate,
    up, down.
    """

    # [num_pages, page_bytes] uint8; page_bytes is a multiple of 128
    pool: Tensor
    # [num_adapters, max_adapter_pages] int32; entries behind an adapter's last page are never read
    page_table: Tensor
    # [num_adapters, num_layers, 7] int32, units of 128 bytes from the start of the adapter's byte string
    start_unit: Tensor
    # [num_adapters, num_layers, 7] int32; 0 = the adapter does not change this module
    lora_rank: Tensor
    # [num_adapters, num_layers, 7] float32
    scaling: Tensor
    # [num_adapters] int32, index into ADAPTER_DTYPES
    dtype: Tensor
    # the largest entry of lora_rank: the width of what lora_shrink returns
    max_lora_rank: int


@dataclass(frozen=True, slots=True)
class Segments:
    """Runs of tokens of one adapter. Segment s holds tokens starts[s] to starts[s + 1]; no adapter has two."""

    # [num_segments + 1] int32, from 0 to num_tokens, not decreasing
    starts: Tensor
    # [num_segments] int32, row of AdapterTables, -1 = no adapter
    adapter: Tensor
