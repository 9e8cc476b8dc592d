"""The launches of one layer in a serving configuration, on tensors that need no memory."""

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.gpu.shapes import MAX_CONTEXT, PAGE_SIZE, QKV, ModelShape, StepShape
from kernels.adapters import AdapterTables, Segments
from kernels.gpu.launch import Launch
from kernels.linear import triton as linear
from kernels.lora_expand import triton as lora_expand
from kernels.lora_shrink import triton as lora_shrink
from kernels.paged_attention import triton as paged_attention
from kernels.rms_norm import triton as rms_norm
from kernels.silu_and_mul import triton as silu_and_mul
from kernels.store_kv import triton as store_kv

NUM_PAGES, ADAPTER_PAGES, LAYER = 4096, 64, 1


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _int32(*shape: int) -> Tensor:
    return _empty(*shape, dtype=torch.int32)


def _tables(model: ModelShape, step: StepShape, page_bytes: int) -> AdapterTables:
    cells = step.adapters, model.layers, 7
    return AdapterTables(
        pool=_empty(NUM_PAGES, page_bytes, dtype=torch.uint8),
        page_table=_int32(step.adapters, ADAPTER_PAGES),
        start_unit=_int32(*cells),
        lora_rank=_int32(*cells),
        scaling=_empty(*cells, dtype=torch.float32),
        dtype=_int32(step.adapters),
        max_lora_rank=step.max_lora_rank,
    )


def layer_launches(model: ModelShape, step: StepShape) -> Iterator[Launch]:
    """Every kernel of a layer once; the projections o, gate/up and down run the kernels of q, k, v at other sizes."""
    tokens, runs = step.tokens, step.adapters
    x = _empty(tokens, model.hidden)
    pages = _empty(NUM_PAGES, model.layers, 2, PAGE_SIZE, model.kv_heads, model.head_dim)
    tables = _tables(model, step, pages[0].numel() * pages.itemsize)
    segments = Segments(_int32(runs + 1), _int32(runs))
    yield from rms_norm.launches(x, _empty(model.hidden), 1e-5, x)[2]
    yield from linear.launches(x, _empty(sum(model.qkv), model.hidden), None)[1]
    shrunk, work = lora_shrink.launches(x, tables, segments, LAYER, QKV)
    yield from work
    fused = _empty(tokens, sum(model.qkv))
    yield from lora_expand.launches(shrunk, tables, segments, LAYER, QKV, model.hidden, model.qkv, fused)
    heads = fused.view(tokens, -1, model.head_dim)
    query, key, value = heads.split_with_sizes([model.heads, model.kv_heads, model.kv_heads], dim=1)
    cos_sin = _empty(MAX_CONTEXT, 2, model.head_dim // 2, dtype=torch.float32)
    indices = _empty(tokens, dtype=torch.int64)
    rotated, work = store_kv.launches(query, key, value, cos_sin, indices, pages, indices, LAYER)
    yield from work
    table, starts = _int32(step.sequences, MAX_CONTEXT // PAGE_SIZE), _int32(step.sequences + 1)
    contexts, scale = _int32(step.sequences), model.head_dim**-0.5
    yield from paged_attention.launches(
        rotated, pages, table, starts, contexts, LAYER, scale, model.window, step.decode_only
    )[1]
    yield from silu_and_mul.launches(_empty(tokens, 2 * model.intermediate))[1]
