"""Decode from one sequence to 256, contexts from 1 to 8,192, ranks from 1 to 256: on every backend of the CPU, against
float64."""

import pytest
import torch
from torch import Tensor

from kernels.lora_expand import lora_expand
from kernels.lora_shrink import lora_shrink
from kernels.paged_attention import paged_attention
from tests.kernels.adapter_pool import PACKED_DTYPES, Adapter, build_segments, build_tables, random_lora
from tests.kernels.kv_pool import PagedContexts, empty_pages

pytestmark = pytest.mark.usefixtures("cpu_backend")

EPS = torch.finfo(torch.float32).eps
RANKS = (1, 3, 8, 16, 64, 256)
IN_FEATURES, OUT_FEATURES, MODULES = 96, (64, 40), (0, 1)


def make_adapter(lora_rank: int, dtype: str, generator: torch.Generator) -> Adapter:
    sizes = dict(zip(MODULES, OUT_FEATURES, strict=True))
    return Adapter(
        dtype,
        {
            (0, module): random_lora(lora_rank, IN_FEATURES, size, dtype, 0.5, generator)
            for module, size in sizes.items()
        },
    )


def lora_by_hand(x: Tensor, adapters: list[Adapter], owners: list[int]) -> tuple[Tensor, Tensor]:
    """scaling * x A B of each token in float64, and its bound: float32 sums of n and of r products, the scaling."""
    values, bounds = (torch.zeros(len(x), sum(OUT_FEATURES), dtype=torch.float64) for _ in range(2))
    for token, owner in enumerate(owners):
        if owner < 0:
            continue
        pairs = [adapters[owner].modules[0, module] for module in MODULES]
        row, (lora_rank, _) = x[token].double(), pairs[0].a.shape
        values[token] = torch.cat([p.scaling * (p.b.double() @ (p.a.double() @ row)) for p in pairs])
        magnitude = [p.scaling * (p.b.double().abs() @ (p.a.double().abs() @ row.abs())) for p in pairs]
        bounds[token] = (IN_FEATURES + lora_rank + 4) * EPS * torch.cat(magnitude)
    return values, bounds


@pytest.mark.parametrize("lora_rank", RANKS, ids=lambda lora_rank: f"rank-{lora_rank}")
@pytest.mark.parametrize("who", ["none", "one", "all-distinct"])
@pytest.mark.parametrize("batch", [1, 8, 256], ids=lambda batch: f"batch-{batch}")
def test_lora(batch: int, who: str, lora_rank: int, generator: torch.Generator) -> None:
    """Ranks of a batch of distinct adapters go from 1 to the largest."""
    count = batch if who == "all-distinct" else 1
    adapters = [
        make_adapter(lora_rank if index == 0 else 1 + index % lora_rank, PACKED_DTYPES[index % 3], generator)
        for index in range(count)
    ]
    owners = {"none": [-1] * batch, "one": [0] * batch, "all-distinct": list(range(batch))}[who]
    segments = build_segments([1] * batch, owners) if who == "all-distinct" else build_segments([batch], owners[:1])
    tables = build_tables(adapters, 1, 2048, generator)
    x, out = torch.randn(batch, IN_FEATURES, generator=generator), torch.zeros(batch, sum(OUT_FEATURES))
    shrunk = lora_shrink(x, tables, segments, 0, MODULES)
    lora_expand(shrunk, tables, segments, 0, MODULES, IN_FEATURES, OUT_FEATURES, out)
    values, bounds = lora_by_hand(x, adapters, owners)
    assert ((out - values).abs() <= bounds).all()


HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 4, 2, 16, 16
SCALE = HEAD_DIM**-0.5


def contexts_in_pages(context_lens: list[int], dtype: torch.dtype, generator: torch.Generator) -> PagedContexts:
    """As `kv_pool.scatter`, page by page."""
    counts = [-(-context // PAGE_SIZE) for context in context_lens]
    pages = torch.randperm(sum(counts), generator=generator).split_with_sizes(counts)
    kv_pages = empty_pages(sum(counts), PAGE_SIZE, KV_HEADS, HEAD_DIM, dtype)
    page_table = torch.full((len(counts), max(counts)), sum(counts), dtype=torch.int32)
    keys, values = [], []
    for sequence, context in enumerate(context_lens):
        page_table[sequence, : counts[sequence]] = pages[sequence]
        padded = torch.full((2, counts[sequence] * PAGE_SIZE, KV_HEADS, HEAD_DIM), torch.nan, dtype=dtype)
        padded[:, :context] = torch.randn(2, context, KV_HEADS, HEAD_DIM, generator=generator).to(dtype)
        kv_pages[pages[sequence], 1] = padded.view(2, -1, PAGE_SIZE, KV_HEADS, HEAD_DIM).transpose(0, 1)
        keys.append(padded[0, :context])
        values.append(padded[1, :context])
    return PagedContexts(kv_pages, page_table, torch.tensor(context_lens, dtype=torch.int32), keys, values)


def attention_by_hand(query: Tensor, paged: PagedContexts) -> tuple[Tensor, Tensor]:
    """Each sequence's one token in float64, and the bound that `test_paged_attention` derives."""
    values, bounds = [], []
    for q, key, value in zip(query.double(), paged.keys, paged.values, strict=True):
        k, v = (cell.double().repeat_interleave(HEADS // KV_HEADS, 1) for cell in (key, value))
        weights = torch.softmax(SCALE * torch.einsum("hd,chd->hc", q, k), dim=1)
        d = (HEAD_DIM + 2) * EPS * SCALE * torch.einsum("hd,chd->hc", q.abs(), k.abs()).amax(1, keepdim=True)
        values.append(torch.einsum("hc,chd->hd", weights, v))
        relative = 2 * d + (2 * len(k) + 8) * EPS
        bounds.append(relative * torch.einsum("hc,chd->hd", weights, v.abs()))
    out = torch.stack(values)
    return out, torch.stack(bounds) + torch.finfo(query.dtype).eps * out.abs()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "context_lens",
    [[1], [8192], [512, 513, 1024, 8191], list(range(1, 257)), [1, 2000, 63, 64, 65] * 3],
    ids=["1", "8192", "around-a-chunk", "batch-256", "ragged"],
)
def test_attention(context_lens: list[int], dtype: torch.dtype, generator: torch.Generator) -> None:
    paged = contexts_in_pages(context_lens, dtype, generator)
    query = torch.randn(len(context_lens), HEADS, HEAD_DIM, generator=generator).to(dtype)
    starts = torch.arange(len(context_lens) + 1, dtype=torch.int32)
    out = paged_attention(query, paged.kv_pages, paged.page_table, starts, paged.context_lens, paged.layer, SCALE)
    values, bounds = attention_by_hand(query, paged)
    assert ((out - values).abs() <= bounds).all()
