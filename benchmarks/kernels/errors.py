"""How far every backend is from float64, by the tests' own definitions and bounds."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kernels import dispatch
from kernels.linear import linear, prepare
from kernels.lora_expand import lora_expand
from kernels.lora_shrink import lora_shrink
from kernels.paged_attention import paged_attention
from kernels.rms_norm import rms_norm
from kernels.silu_and_mul import silu_and_mul
from kernels.store_kv import store_kv
from tests.kernels import (
    test_linear,
    test_lora_expand,
    test_lora_shrink,
    test_paged_attention,
    test_rms_norm,
    test_silu_and_mul,
    test_store_kv,
)
from tests.kernels.adapter_pool import build_segments, build_tables
from tests.kernels.kv_pool import empty_pages, scatter

DTYPES = (torch.float32, torch.bfloat16)
# (what came out, what should have, how far off it may be)
Outcome = tuple[Tensor, Tensor, Tensor]


def _linear(dtype: torch.dtype, generator: torch.Generator) -> Outcome:
    x = torch.randn(200, 700, generator=generator).to(dtype)
    weight = torch.randn(192, 700, generator=generator).to(dtype)
    values, bounds = test_linear.expected(x, weight, None)
    return linear(x, prepare(weight.clone())), values, bounds + torch.finfo(dtype).eps / 2 * values.abs()


def _lora_shrink(dtype: torch.dtype, generator: torch.Generator) -> Outcome:
    adapters = test_lora_shrink.make_adapters([8, 64], [str(dtype).removeprefix("torch.")] * 2, generator)
    tables, segments = build_tables(adapters, 2, 1024, generator), build_segments([9, 40], [0, 1])
    x, modules = torch.randn(49, test_lora_shrink.IN_FEATURES, generator=generator), test_lora_shrink.QKV
    out = lora_shrink(x, tables, segments, 0, modules)
    return out, *test_lora_shrink.expected(x, adapters, segments, 0, modules, 64)


def _lora_expand(dtype: torch.dtype, generator: torch.Generator) -> Outcome:
    adapters = test_lora_expand.make_adapters([8, 64], ["float32"] * 2, generator)
    tables, segments = build_tables(adapters, 2, 1024, generator), build_segments([9, 40], [0, 1])
    modules = test_lora_expand.QKV
    sizes = tuple(test_lora_expand.OUT_FEATURES[module] for module in modules)
    shrunk, out = (
        torch.randn(3, 49, 64, generator=generator),
        torch.randn(49, sum(sizes), generator=generator).to(dtype),
    )
    wanted = test_lora_expand.expected(shrunk, adapters, segments, 0, modules, out)
    lora_expand(shrunk, tables, segments, 0, modules, test_lora_expand.IN_FEATURES, sizes, out)
    return out, *wanted


def _paged_attention(dtype: torch.dtype, generator: torch.Generator) -> Outcome:
    lengths = [(1, 700), (33, 90)]
    paged = scatter([context for _, context in lengths], 16, 2, test_paged_attention.HEAD_DIM, dtype, generator)
    query = torch.randn(34, 6, test_paged_attention.HEAD_DIM, generator=generator).to(dtype)
    starts = torch.tensor([0, 1, 34], dtype=torch.int32)
    layer, scale = paged.layer, test_paged_attention.SCALE
    out = paged_attention(query, paged.kv_pages, paged.page_table, starts, paged.context_lens, layer, scale)
    return out, *test_paged_attention.expected(query, paged, lengths, 0)


def _store_kv(dtype: torch.dtype, generator: torch.Generator) -> Outcome:
    query, key, value = torch.randn(3, 33, 4, test_store_kv.HEAD_DIM, generator=generator).to(dtype).unbind(0)
    pages, positions = empty_pages(12, 4, 4, test_store_kv.HEAD_DIM, dtype), torch.arange(33)
    out = store_kv(query, key, value, test_store_kv.cos_sin(), positions, pages, positions, 1)
    return out, *test_store_kv.expected_rotation(query, positions)


def _rms_norm(dtype: torch.dtype, generator: torch.Generator) -> Outcome:
    x, weight = torch.randn(64, 768, generator=generator).to(dtype), torch.randn(768, generator=generator).to(dtype)
    return rms_norm(x, weight, test_rms_norm.NORM_EPS)[0], *test_rms_norm.expected(x, weight)


def _silu_and_mul(dtype: torch.dtype, generator: torch.Generator) -> Outcome:
    gate_up = (4 * torch.randn(64, 2000, generator=generator)).to(dtype)
    return silu_and_mul(gate_up), *test_silu_and_mul.expected(gate_up)


OPS: dict[str, Callable[[torch.dtype, torch.Generator], Outcome]] = {
    "linear": _linear,
    "lora_shrink": _lora_shrink,
    "lora_expand": _lora_expand,
    "paged_attention": _paged_attention,
    "store_kv": _store_kv,
    "rms_norm": _rms_norm,
    "silu_and_mul": _silu_and_mul,
}


def error_rows() -> Iterator[dict[str, object]]:
    """worst_error: largest difference, of the largest value. worst_share: largest difference of its own bound."""
    for op, outcome in OPS.items():
        for dtype in DTYPES:
            for backend in dispatch.CPU_BACKENDS:
                with dispatch.force(backend):
                    out, wanted, bounds = outcome(dtype, torch.Generator().manual_seed(1))
                difference = (out.double() - wanted).abs()
                share = (difference / bounds.clamp(min=1e-300)).masked_fill(difference == 0, 0.0)
                yield {
                    "op": op,
                    "dtype": str(dtype).removeprefix("torch."),
                    "backend": backend,
                    "worst_error": float(f"{float(difference.max() / wanted.abs().max()):.2e}"),
                    "worst_share": round(float(share.max()), 3),
                }
