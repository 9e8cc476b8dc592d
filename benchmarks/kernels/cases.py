"""How to make the inputs of each operation, and how many bytes and operations its result needs at least."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.kernels.models import (
    RANKS,
    SIZES,
    Size,
    make_batch,
    make_decoder,
    make_paged,
    make_segments,
    make_tables,
    module_shapes,
)
from kernels.linear import linear, prepare
from kernels.lora_expand import lora_expand
from kernels.lora_shrink import lora_shrink
from kernels.paged_attention import paged_attention
from kernels.rms_norm import rms_norm
from kernels.silu_and_mul import silu_and_mul
from kernels.store_kv import store_kv

# A case goes round among copies of what it reads, as a model goes round among its layers.
CYCLE_BYTES, MAX_COPIES = 1 << 28, 32
QKV = (0, 1, 2)


@dataclass(frozen=True, slots=True)
class Case:
    """`make` builds the inputs for the backend in force and returns the run."""

    op: str
    label: str
    read_bytes: float
    flops: float
    make: Callable[[], Callable[[], object]]


def _in_turn(runs: list[Callable[[], object]]) -> Callable[[], object]:
    turn = iter(range(1 << 60))
    return lambda: runs[next(turn) % len(runs)]()


def _copies(read_bytes: float) -> int:
    return max(1, min(MAX_COPIES, int(CYCLE_BYTES / read_bytes)))


def linear_cases(name: str, size: Size) -> Iterator[Case]:
    shapes = {"qkv": (size.hidden, size.hidden + 2 * size.kv_heads * size.head_dim)}
    shapes |= {"gate-up": (size.hidden, 2 * size.intermediate), "down": (size.intermediate, size.hidden)}
    for part, (inputs, outputs) in shapes.items():
        for tokens in (1, 8, 64, 512):

            def make(inputs: int = inputs, outputs: int = outputs, tokens: int = tokens) -> Callable[[], object]:
                x = torch.randn(tokens, inputs)
                weights = [prepare(torch.randn(outputs, inputs)) for _ in range(_copies(4 * inputs * outputs))]
                return _in_turn([partial(linear, x, weight) for weight in weights])

            label = f"{name} {part} tokens={tokens}"
            yield Case("linear", label, 4.0 * inputs * outputs, 2.0 * tokens * inputs * outputs, make)


def lora_cases(name: str, size: Size) -> Iterator[Case]:
    shapes = module_shapes(size)[:3]
    outputs = tuple(out for _, out in shapes)
    for tokens, adapters in ((1, 1), (8, 8), (64, 1), (64, 64), (512, 1), (512, 8)):
        ranks = [RANKS[index % 4] for index in range(adapters)]
        rank_tokens = sum(ranks) * tokens / adapters
        for op, reads in (("lora_shrink", 3 * size.hidden), ("lora_expand", sum(outputs))):

            def make(op: str = op, tokens: int = tokens, ranks: list[int] = ranks) -> Callable[[], object]:
                tables, segments = make_tables(shapes, ranks, 4), make_segments(tokens, len(ranks))
                x, out = torch.randn(tokens, size.hidden), torch.zeros(tokens, sum(outputs))
                shrunk = lora_shrink(x, tables, segments, 0, QKV)
                layers = range(4)
                if op == "lora_shrink":
                    return _in_turn([partial(lora_shrink, x, tables, segments, i, QKV) for i in layers])
                sizes = size.hidden, outputs, out
                return _in_turn([partial(lora_expand, shrunk, tables, segments, i, QKV, *sizes) for i in layers])

            label = f"{name} qkv tokens={tokens} adapters={adapters}"
            yield Case(op, label, 4.0 * sum(ranks) * reads, 2.0 * rank_tokens * reads, make)


def attention_cases(name: str, size: Size) -> Iterator[Case]:
    for sequences, new, context in ((1, 1, 128), (1, 1, 8192), (64, 1, 128), (64, 1, 1024), (1, 512, 512), (8, 64, 64)):

        def make(sequences: int = sequences, new: int = new, context: int = context) -> Callable[[], object]:
            paged = make_paged(size, 1, sequences, new, context)
            query = torch.randn(sequences * new, size.heads, size.head_dim)
            lens = paged.query_start, paged.context_lens
            return lambda: paged_attention(query, paged.kv_pages, paged.page_table, *lens, 0, size.head_dim**-0.5)

        kv_bytes = 8.0 * sequences * context * size.kv_heads * size.head_dim
        pairs = sequences * new * (context - (new - 1) / 2)
        label = f"{name} sequences={sequences} new={new} context={context}"
        yield Case("paged_attention", label, kv_bytes, 4.0 * pairs * size.heads * size.head_dim, make)


def row_cases(name: str, size: Size) -> Iterator[Case]:
    """Operations that read and write each element once."""
    heads = size.heads + 2 * size.kv_heads
    for tokens in (1, 64, 512):

        def norm(tokens: int = tokens) -> Callable[[], object]:
            x, residual = torch.randn(2, tokens, size.hidden).unbind(0)
            return lambda: rms_norm(x, torch.ones(size.hidden), 1e-6, residual)

        def gate(tokens: int = tokens) -> Callable[[], object]:
            gate_up = torch.randn(tokens, 2 * size.intermediate)
            return lambda: silu_and_mul(gate_up)

        def rotate(tokens: int = tokens) -> Callable[[], object]:
            paged = make_paged(size, 1, 1, tokens, tokens)
            parts = [size.heads, size.kv_heads, size.kv_heads]
            q, k, v = torch.randn(tokens, heads, size.head_dim).split_with_sizes(parts, dim=1)
            cos_sin = torch.randn(tokens, 2, size.head_dim // 2)
            return lambda: store_kv(q, k, v, cos_sin, paged.positions, paged.kv_pages, paged.slot_mapping, 0)

        label = f"{name} tokens={tokens}"
        yield Case("rms_norm", label, 16.0 * tokens * size.hidden, 4.0 * tokens * size.hidden, norm)
        yield Case("silu_and_mul", label, 12.0 * tokens * size.intermediate, 0, gate)
        yield Case("store_kv", label, 8.0 * tokens * heads * size.head_dim, 0, rotate)


def step_cases(name: str, size: Size) -> Iterator[Case]:
    """The whole decoder. Its floor counts the weights, the adapters and the keys and values once."""
    per_layer = sum(inputs * outputs for inputs, outputs in module_shapes(size))
    weights = size.layers * per_layer + size.hidden * size.vocab
    lora_shapes = module_shapes(size)[:4]
    for sequences, new, context in ((1, 1, 128), (8, 1, 128), (64, 1, 128), (8, 64, 64), (1, 512, 512)):
        for adapters in sorted({0, min(1, sequences), min(8, sequences), min(64, sequences)}):
            ranks = [RANKS[index % 4] for index in range(adapters)]
            lora = size.layers * sum(ranks) * sum(inputs + outputs for inputs, outputs in lora_shapes)
            kv = 2 * size.layers * sequences * context * size.kv_heads * size.head_dim

            def make(
                sequences: int = sequences, new: int = new, context: int = context, ranks: list[int] = ranks
            ) -> Callable[[], object]:
                decoder = make_decoder(size)
                tables = make_tables(lora_shapes, ranks, size.layers) if ranks else None
                batch = make_batch(size, sequences, new, context, tables)
                return lambda: decoder.forward(batch)

            tokens = sequences * new
            flops = 2.0 * (tokens * size.layers * per_layer + sequences * size.hidden * size.vocab)
            flops += 2.0 * lora * tokens / max(adapters, 1)
            label = f"{name} sequences={sequences} new={new} context={context} adapters={adapters}"
            yield Case("decoder_step", label, 4.0 * (weights + lora + kv), flops, make)


def all_cases() -> Iterator[Case]:
    for name, size in SIZES.items():
        for cases in (linear_cases, lora_cases, attention_cases, row_cases, step_cases):
            yield from cases(name, size)
