"""Adapters packed by the product's own packer and scattered over a pool whose other bytes are NaN."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common import packing
from kernels.adapters import ADAPTER_DTYPES, AdapterTables, Segments

NUM_MODULES = len(packing.MODULES)
PACKED_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """A: `[lora_rank, in_features]`, B: `[out_features, lora_rank]`, as PEFT keeps them."""

    a: Tensor
    b: Tensor
    scaling: float


@dataclass(frozen=True, slots=True)
class Adapter:
    """`modules[layer, module number]`; `dtype` is one of PACKED_DTYPES."""

    dtype: str
    modules: Mapping[tuple[int, int], LoraWeights]


def random_lora(
    lora_rank: int, in_features: int, out_features: int, dtype: str, scaling: float, generator: torch.Generator
) -> LoraWeights:
    element = ADAPTER_DTYPES[PACKED_DTYPES.index(dtype)]
    a = torch.randn(lora_rank, in_features, generator=generator).to(element)
    return LoraWeights(a, torch.randn(out_features, lora_rank, generator=generator).to(element), scaling)


def build_tables(
    adapters: Sequence[Adapter], num_layers: int, page_bytes: int, generator: torch.Generator
) -> AdapterTables:
    """Places the adapters in random pages of a pool; unused pages and the tail of each last page are NaN bytes."""
    packed = [_pack(adapter) for adapter in adapters]
    counts = [-(-layout.total_bytes // page_bytes) for layout, _ in packed]
    pages = torch.randperm(sum(counts) + 3, generator=generator).split_with_sizes([*counts, 3])
    pool = torch.full((sum(counts) + 3, page_bytes), 0xFF, dtype=torch.uint8)
    # an entry behind the last page points outside the pool: reading it is an error
    page_table = torch.full((len(adapters), max(counts)), len(pool), dtype=torch.int32)
    shape = len(adapters), num_layers, NUM_MODULES
    start_unit, lora_rank, scaling = torch.zeros(shape), torch.zeros(shape), torch.zeros(shape)
    for row, (layout, data) in enumerate(packed):
        page_table[row, : counts[row]] = pages[row]
        for index, page in enumerate(pages[row].tolist()):
            piece = data[index * page_bytes : (index + 1) * page_bytes]
            pool[page, : len(piece)] = piece
        for module in layout.modules:
            place = row, module.layer, packing.MODULE_INDEX[module.module]
            start_unit[place], lora_rank[place] = module.start_unit, module.lora_rank
            scaling[place] = module.scaling
    return AdapterTables(
        pool=pool,
        page_table=page_table,
        start_unit=start_unit.to(torch.int32),
        lora_rank=lora_rank.to(torch.int32),
        scaling=scaling,
        dtype=torch.tensor([PACKED_DTYPES.index(adapter.dtype) for adapter in adapters], dtype=torch.int32),
        max_lora_rank=int(lora_rank.max()),
    )


def _pack(adapter: Adapter) -> tuple[packing.PackedLayout, Tensor]:
    specs, weights = [], {}
    for (layer, number), lora in adapter.modules.items():
        module, (lora_rank, in_features) = packing.MODULES[number], lora.a.shape
        specs.append(packing.ModuleSpec(layer, module, lora_rank, lora.scaling, in_features, len(lora.b)))
        weights[layer, module] = (_bits(lora.a).numpy(), _bits(lora.b).numpy())
    layout, data = packing.pack(packing.plan(specs, adapter.dtype), weights)
    return layout, torch.from_numpy(data)


def _bits(tensor: Tensor) -> Tensor:
    """The same bits as integers: numpy has no bfloat16."""
    return tensor.contiguous().view({4: torch.int32, 2: torch.int16}[tensor.itemsize])


def build_segments(lengths: Sequence[int], adapter: Sequence[int]) -> Segments:
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return Segments(starts, torch.tensor(adapter, dtype=torch.int32))
