"""Inputs of a layer's operations and of a whole step, drawn on the device that runs them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu.shapes import PAGE_SIZE, ModelShape, StepShape
from common.packing import MODULES, ModuleSpec, PackedLayout, plan
from gpu_worker.batch import ForwardBatch
from kernels.adapters import ADAPTER_DTYPES, AdapterTables, Segments

SCALING = 2.0
CHUNK_ELEMENTS = 1 << 27


def module_shapes(model: ModelShape) -> dict[str, tuple[int, int]]:
    """(in_features, out_features) of each projection."""
    q, k, v = model.qkv
    wide = {"gate_proj": (model.hidden, model.intermediate), "up_proj": (model.hidden, model.intermediate)}
    attention = {"q_proj": (model.hidden, q), "k_proj": (model.hidden, k), "v_proj": (model.hidden, v)}
    return attention | {"o_proj": (q, model.hidden)} | wide | {"down_proj": (model.intermediate, model.hidden)}


def page_bytes(model: ModelShape, dtype: torch.dtype) -> int:
    return PAGE_SIZE * model.layers * 2 * model.kv_heads * model.head_dim * dtype.itemsize


def ranks_of(step: StepShape) -> list[int]:
    """Of each adapter: the largest, then halves of it in turn."""
    sizes = [max(1, step.max_lora_rank >> shift) for shift in range(3)]
    return [sizes[index % len(sizes)] for index in range(step.adapters)]


def layout_of(model: ModelShape, rank: int, dtype: torch.dtype, modules: tuple[str, ...]) -> PackedLayout:
    """An adapter on `modules` of every layer."""
    shapes = module_shapes(model)
    specs = [ModuleSpec(layer, m, rank, SCALING, *shapes[m]) for layer in range(model.layers) for m in modules]
    return plan(specs, str(dtype).removeprefix("torch."))


def fill_adapters(pool: Tensor, dtype: torch.dtype, generator: torch.Generator, scale: float = 0.02) -> None:
    """Random elements of `dtype` in every byte of a pool."""
    for part in pool.view(dtype).flatten().split(CHUNK_ELEMENTS):
        part.normal_(0, scale, generator=generator)


def make_tables(
    model: ModelShape,
    ranks: list[int],
    dtype: torch.dtype,
    generator: torch.Generator,
    modules: tuple[str, ...] = MODULES,
) -> AdapterTables:
    """Random adapters on `modules` of every layer, in pages in any order, as the packer lays them out."""
    device, size = generator.device, page_bytes(model, dtype)
    cells = len(ranks), model.layers, len(MODULES)
    start_unit, lora_rank = torch.zeros(cells, dtype=torch.int32), torch.zeros(cells, dtype=torch.int32)
    layouts = {rank: layout_of(model, rank, dtype, modules) for rank in set(ranks)}
    counts = [-(-layouts[rank].total_bytes // size) for rank in ranks]
    for rank, layout in layouts.items():
        rows = torch.tensor([row for row, other in enumerate(ranks) if other == rank])
        for module in layout.modules:
            place = rows, module.layer, MODULES.index(module.module)
            start_unit[place], lora_rank[place] = module.start_unit, rank
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(1)).split_with_sizes(counts)
    page_table = torch.zeros(len(ranks), max(counts), dtype=torch.int32)
    for row, pages in enumerate(order):
        page_table[row, : len(pages)] = pages
    pool = torch.empty(sum(counts), size, dtype=torch.uint8, device=device)
    fill_adapters(pool, dtype, generator)
    return AdapterTables(
        pool=pool,
        page_table=page_table.to(device),
        start_unit=start_unit.to(device),
        lora_rank=lora_rank.to(device),
        scaling=torch.full(cells, SCALING, device=device),
        dtype=torch.full((len(ranks),), ADAPTER_DTYPES.index(dtype), dtype=torch.int32, device=device),
        max_lora_rank=max(ranks),
    )


def make_segments(num_tokens: int, num_adapters: int, device: torch.device, base_tokens: int = 0) -> Segments:
    """`base_tokens` of the base model, then equal runs of every adapter; without adapters all are the base model's."""
    if not num_adapters:
        base_tokens = num_tokens
    rest = torch.arange(num_adapters + 1) * (num_tokens - base_tokens) // max(num_adapters, 1) + base_tokens
    first = 0 if num_adapters and not base_tokens else -1
    starts = rest if first == 0 else torch.cat((torch.zeros(1, dtype=torch.int64), rest))
    owners = torch.arange(first, num_adapters, dtype=torch.int32)
    return Segments(starts.to(torch.int32).to(device), owners.to(device))


@dataclass(frozen=True, slots=True)
class Paged:
    """Sequences in pages in any order; `lengths[i]` = (query tokens, context) of sequence i."""

    kv_pages: Tensor
    page_table: Tensor
    query_start: Tensor
    context_lens: Tensor
    positions: Tensor
    slot_mapping: Tensor
    lengths: tuple[tuple[int, int], ...]


def make_paged(
    model: ModelShape, lengths: list[tuple[int, int]], dtype: torch.dtype, generator: torch.Generator, layers: int = 0
) -> Paged:
    """`layers` 0 = as many as the model has."""
    device = generator.device
    counts = [-(-context // PAGE_SIZE) for _, context in lengths]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(2)).split_with_sizes(counts)
    table = torch.zeros(len(lengths), max(counts), dtype=torch.int64)
    for row, pages in enumerate(order):
        table[row, : len(pages)] = pages
    positions = torch.cat([torch.arange(context - new, context) for new, context in lengths])
    owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor([new for new, _ in lengths]))
    slots = table[owner, positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE
    shape = sum(counts), layers or model.layers, 2, PAGE_SIZE, model.kv_heads, model.head_dim
    kv_pages = torch.empty(shape, dtype=dtype, device=device)
    for part in kv_pages.flatten().split(CHUNK_ELEMENTS):
        part.normal_(generator=generator)
    starts = torch.tensor([0, *(new for new, _ in lengths)]).cumsum(0).to(torch.int32)
    contexts = torch.tensor([context for _, context in lengths], dtype=torch.int32)
    return Paged(
        kv_pages=kv_pages,
        page_table=table.to(torch.int32).to(device),
        query_start=starts.to(device),
        context_lens=contexts.to(device),
        positions=positions.to(device),
        slot_mapping=slots.to(device),
        lengths=tuple(lengths),
    )


def make_batch(
    model: ModelShape, paged: Paged, tables: AdapterTables | None, index_device: torch.device
) -> ForwardBatch:
    """A whole step whose indices are on `index_device`; adapters are shared out among the sequences."""
    num_tokens = len(paged.positions)
    num_adapters = 0 if tables is None else len(tables.dtype)
    names = ("positions", "slot_mapping", "page_table", "query_start", "context_lens")
    fields = {name: getattr(paged, name).to(index_device) for name in names}
    return ForwardBatch(
        token_ids=torch.randint(model.vocab, (num_tokens,), generator=torch.Generator().manual_seed(3)).to(
            index_device
        ),
        **fields,
        logit_rows=(fields["query_start"][1:] - 1).to(torch.int64),
        segments=make_segments(num_tokens, num_adapters, index_device),
        adapters=tables,
        kv_pages=paged.kv_pages,
        decode_only=all(new == 1 for new, _ in paged.lengths),
    )
