"""Every operation of a layer against its floor: the bytes it must move, or the products it must make.

The floor of a LoRA operation counts each distinct adapter once, that of attention each key and value once; what the
device can read, copy and multiply is measured in the same run.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.gpu import goals
from benchmarks.gpu.inputs import make_paged, make_segments, make_tables, ranks_of
from benchmarks.gpu.machine import Floors, seconds_of
from benchmarks.gpu.shapes import PAGE_SIZE, QKV, ModelShape, StepShape
from kernels import dispatch
from kernels.linear import linear
from kernels.lora_expand import lora_expand
from kernels.lora_shrink import lora_shrink
from kernels.paged_attention import paged_attention
from kernels.rms_norm import rms_norm
from kernels.silu_and_mul import silu_and_mul
from kernels.store_kv import store_kv

MAX_LAYERS = 8
Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Case:
    """`calls`: one a layer, so that what a layer reads is not in a cache when its turn comes."""

    op: str
    label: str
    num_bytes: float
    flops: float
    calls: Sequence[Call]


def cases(model: ModelShape, step: StepShape, dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    yield from _lora_cases(model, step, dtype, generator)
    yield from _attention_cases(model, step, dtype, generator)
    yield from _row_cases(model, step, dtype, generator)


def _layers(model: ModelShape) -> range:
    return range(min(model.layers, MAX_LAYERS))


def _lora_cases(model: ModelShape, step: StepShape, dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    device, tokens, size = generator.device, step.tokens, dtype.itemsize
    outputs, width = model.qkv, sum(model.qkv)
    for adapters in sorted({1, step.adapters}):
        ranks = [16] * adapters if adapters == 1 else ranks_of(step)
        tables = make_tables(model, ranks, dtype, generator, ("q_proj", "k_proj", "v_proj"))
        segments = make_segments(tokens, adapters, device)
        x = torch.randn(tokens, model.hidden, dtype=dtype, device=device)
        out = torch.zeros(tokens, width, dtype=dtype, device=device)
        shrunk = lora_shrink(x, tables, segments, 0, QKV)
        label, rank_tokens = f"q k v, {adapters} adapters", sum(ranks) * tokens / adapters
        shrink = [partial(lora_shrink, x, tables, segments, layer, QKV) for layer in _layers(model)]
        expand = [
            partial(lora_expand, shrunk, tables, segments, layer, QKV, model.hidden, outputs, out)
            for layer in _layers(model)
        ]
        a_bytes = size * (3 * sum(ranks) * model.hidden + x.numel())
        b_bytes = size * (sum(ranks) * width + 2 * out.numel())
        yield Case("lora_shrink", label, a_bytes, 6.0 * rank_tokens * model.hidden, shrink)
        yield Case("lora_expand", label, b_bytes, 2.0 * rank_tokens * width, expand)


def _attention_cases(
    model: ModelShape, step: StepShape, dtype: torch.dtype, generator: torch.Generator
) -> Iterator[Case]:
    tiny = model.hidden < 1024
    for context in (33,) if tiny else (1024, 8192):
        sequences = step.sequences if context <= 1024 else max(1, step.sequences // 8)
        new = step.tokens // step.sequences
        lengths = [(new, max(context, new))] * sequences
        layers = _layers(model)
        paged = make_paged(model, lengths, dtype, generator, layers=len(layers))
        query = torch.randn(sequences * new, model.heads, model.head_dim, dtype=dtype, device=generator.device)
        where = paged.kv_pages, paged.page_table, paged.query_start, paged.context_lens
        run = partial(paged_attention, query, *where, decode_only=new == 1)
        calls = [partial(run, layer=layer, scale=0.1, sliding_window=model.window) for layer in layers]
        kv_bytes = 2.0 * dtype.itemsize * sum(c for _, c in lengths) * model.kv_heads * model.head_dim
        pairs = sum(n * (c - (n - 1) / 2) for n, c in lengths)
        label = f"{sequences} sequences, context {context}"
        yield Case("paged_attention", label, kv_bytes, 4.0 * pairs * model.heads * model.head_dim, calls)


def _row_cases(model: ModelShape, step: StepShape, dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    """Operations that read and write each element once, and the product with q, k, v for comparison."""
    device, tokens, size, count = generator.device, step.tokens, dtype.itemsize, len(_layers(model))

    def draw(*shape: int) -> list[torch.Tensor]:
        return [torch.randn(shape, dtype=dtype, device=device) for _ in range(count)]

    rows, weight = draw(tokens, model.hidden), torch.ones(model.hidden, dtype=dtype, device=device)
    norms: list[Call] = [partial(rms_norm, x, weight, 1e-5, x) for x in rows]
    yield Case("rms_norm", "", 4.0 * size * tokens * model.hidden, 0, norms)
    gates: list[Call] = [partial(silu_and_mul, x) for x in draw(tokens, 2 * model.intermediate)]
    yield Case("silu_and_mul", "", 3.0 * size * tokens * model.intermediate, 0, gates)
    products: list[Call] = [partial(linear, rows[0], w) for w in draw(sum(model.qkv), model.hidden)]
    product = sum(model.qkv) * model.hidden
    yield Case("linear", "q k v", float(size * product), 2.0 * tokens * product, products)
    heads = model.heads + 2 * model.kv_heads
    paged = make_paged(model, [(1, 1)] * tokens, dtype, generator, layers=count)
    cos_sin = torch.ones(PAGE_SIZE, 2, model.head_dim // 2, device=device)
    stores: list[Call] = []
    for layer, fused in enumerate(draw(tokens, heads, model.head_dim)):
        q, k, v = fused.split_with_sizes([model.heads, model.kv_heads, model.kv_heads], dim=1)
        where = paged.positions, paged.kv_pages, paged.slot_mapping
        stores.append(partial(store_kv, q, k, v, cos_sin, *where, layer))
    yield Case("store_kv", "", 2.0 * size * tokens * heads * model.head_dim, 0, stores)


def rows(
    models: dict[str, ModelShape], steps: dict[str, StepShape], floors: Floors, generator: torch.Generator
) -> Iterator[dict[str, object]]:
    with dispatch.force("triton") if generator.device.type == "cpu" else dispatch.force(""), torch.inference_mode():
        for name, model in models.items():
            for step_name, step in steps.items():
                for case in cases(model, step, torch.bfloat16, generator):
                    yield _row(case, f"{name} {step_name} {case.label}".strip(), step, floors, generator.device)


def _row(case: Case, label: str, step: StepShape, floors: Floors, device: torch.device) -> dict[str, object]:
    calls = dispatch.calls.copy()
    took = seconds_of(case.calls, device)
    floor = floors.seconds(case.num_bytes, case.flops)
    row: dict[str, object] = {
        "op": case.op,
        "case": label,
        "backend": "+".join(sorted({backend for op, backend in dispatch.calls - calls if op == case.op})),
        "microseconds": round(1e6 * took, 2),
        "floor_microseconds": round(1e6 * floor, 2),
        "floor_share": round(floor / took, 4),
    }
    if case.op == "paged_attention" and step.decode_only:
        row |= goals.at_least("share_of_copy", case.num_bytes / took / floors.copy_bytes_per_second, 0.8)
    return row
