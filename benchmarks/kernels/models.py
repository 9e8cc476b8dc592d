"""Decoders and adapters of the benchmarks, with random weights: nothing is downloaded."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gpu_worker.batch import ForwardBatch
from gpu_worker.models.config import ModelConfig
from gpu_worker.models.decoder import Decoder
from gpu_worker.models.weights import DecoderWeights, LayerWeights, Projection
from kernels.adapters import AdapterTables, Segments
from kernels.linear import prepare

UNIT_BYTES, PAGE_SIZE = 128, 16
RANKS = (8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class Size:
    """The numbers of a Llama config.json."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def config(self, max_context_tokens: int) -> ModelConfig:
        return ModelConfig.from_hf(
            {
                "model_type": "llama",
                "hidden_size": self.hidden,
                "num_hidden_layers": self.layers,
                "num_attention_heads": self.heads,
                "num_key_value_heads": self.kv_heads,
                "intermediate_size": self.intermediate,
                "vocab_size": self.vocab,
                "max_position_embeddings": max_context_tokens,
            }
        )


SIZES = {"S": Size(256, 4, 8, 4, 688, 2048), "M": Size(768, 12, 12, 4, 2048, 8192)}


def make_decoder(size: Size, max_context_tokens: int = 8192) -> Decoder:
    """Weights are prepared for the backend in force."""
    config = size.config(max_context_tokens)
    shapes = config.geometry.module_shapes

    def projection(*modules: str) -> Projection:
        in_features, outs = shapes[modules[0]][0], tuple(shapes[module][1] for module in modules)
        weight = prepare(torch.randn(sum(outs), in_features) * in_features**-0.5)
        return Projection(weight, None, in_features, outs)

    def layer() -> LayerWeights:
        ones = torch.ones(size.hidden)
        qkv, gate_up = projection("q_proj", "k_proj", "v_proj"), projection("gate_proj", "up_proj")
        return LayerWeights(ones, qkv, None, None, projection("o_proj"), ones, gate_up, projection("down_proj"))

    embedding, head = torch.randn(2, size.vocab, size.hidden).unbind(0)
    layers = tuple(layer() for _ in range(size.layers))
    return Decoder(config, DecoderWeights(embedding, layers, torch.ones(size.hidden), prepare(head.contiguous())))


def make_tables(
    shapes: list[tuple[int, int]], ranks: list[int], num_layers: int, page_bytes: int = 1 << 16
) -> AdapterTables:
    """float32 adapters of one rank each on the modules of `shapes`, (in, out) from number 0 on; pages in any order."""

    def units(features: int) -> int:
        return -(-features * 4 // UNIT_BYTES)

    start_unit = torch.zeros(len(ranks), num_layers, 7, dtype=torch.int32)
    lora_rank = torch.zeros_like(start_unit)
    totals = []
    for row, rank in enumerate(ranks):
        unit = 0
        for layer in range(num_layers):
            for module, (in_features, out_features) in enumerate(shapes):
                start_unit[row, layer, module], lora_rank[row, layer, module] = unit, rank
                unit += rank * (units(in_features) + units(out_features))
        totals.append(-(-unit * UNIT_BYTES // page_bytes))
    pages = torch.randperm(sum(totals)).to(torch.int32).split_with_sizes(totals)
    page_table = torch.zeros(len(ranks), max(totals), dtype=torch.int32)
    for row, own in enumerate(pages):
        page_table[row, : len(own)] = own
    pool = (torch.randn(sum(totals), page_bytes // 4) * 0.01).view(torch.uint8)
    scaling = torch.full(start_unit.shape, 2.0)
    dtype = torch.zeros(len(ranks), dtype=torch.int32)
    return AdapterTables(pool, page_table, start_unit, lora_rank, scaling, dtype, max(ranks))


def module_shapes(size: Size) -> list[tuple[int, int]]:
    kv = size.kv_heads * size.head_dim
    attention = [(size.hidden, size.hidden), (size.hidden, kv), (size.hidden, kv), (size.hidden, size.hidden)]
    return [*attention, *[(size.hidden, size.intermediate)] * 2, (size.intermediate, size.hidden)]


def make_segments(tokens: int, num_adapters: int) -> Segments:
    """Tokens in equal runs, one an adapter; no adapters = one run of the base."""
    runs = max(num_adapters, 1)
    starts = torch.arange(runs + 1) * tokens // runs
    first = 0 if num_adapters else -1
    return Segments(starts.to(torch.int32), torch.arange(first, first + runs, dtype=torch.int32))


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """`sequences` that each bring `new` tokens and then have `context`; pages in any order."""

    kv_pages: Tensor
    page_table: Tensor
    query_start: Tensor
    context_lens: Tensor
    positions: Tensor
    slot_mapping: Tensor


def make_paged(size: Size, layers: int, sequences: int, new: int, context: int) -> PagedBatch:
    per_sequence = -(-context // PAGE_SIZE)
    pages = torch.randperm(sequences * per_sequence).view(sequences, per_sequence).to(torch.int32)
    positions = torch.arange(context - new, context).repeat(sequences)
    page = pages.to(torch.int64)[torch.arange(sequences).repeat_interleave(new), positions // PAGE_SIZE]
    return PagedBatch(
        torch.randn(sequences * per_sequence, layers, 2, PAGE_SIZE, size.kv_heads, size.head_dim),
        pages,
        (torch.arange(sequences + 1) * new).to(torch.int32),
        torch.full((sequences,), context, dtype=torch.int32),
        positions,
        page * PAGE_SIZE + positions % PAGE_SIZE,
    )


def make_batch(size: Size, sequences: int, new: int, context: int, adapters: AdapterTables | None) -> ForwardBatch:
    """The last token of each sequence wants logits; adapters are shared out among the sequences."""
    paged = make_paged(size, size.layers, sequences, new, context)
    num_adapters = 0 if adapters is None else len(adapters.dtype)
    return ForwardBatch(
        token_ids=torch.randint(size.vocab, (sequences * new,)),
        positions=paged.positions,
        slot_mapping=paged.slot_mapping,
        page_table=paged.page_table,
        query_start=paged.query_start,
        context_lens=paged.context_lens,
        logit_rows=(torch.arange(sequences) + 1) * new - 1,
        segments=make_segments(sequences * new, num_adapters),
        adapters=adapters,
        kv_pages=paged.kv_pages,
    )
