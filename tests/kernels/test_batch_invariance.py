"""A token's bits depend on the token alone: not on the rows beside it, on chunks, or on the number of threads."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import dispatch
from kernels.adapters import AdapterTables
from kernels.linear import as_rows, linear, pack
from kernels.lora_expand import lora_expand
from kernels.lora_shrink import lora_shrink
from kernels.paged_attention import paged_attention
from kernels.rms_norm import rms_norm
from kernels.silu_and_mul import silu_and_mul
from kernels.store_kv import store_kv
from tests.kernels.adapter_pool import Adapter, build_segments, build_tables, random_lora
from tests.kernels.kv_pool import PagedContexts, empty_pages, scatter

COUNTS = (1, 2, 3, 5, 6, 7, 12, 13, 33, 64)
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True, params=[1, 2], ids=["1-thread", "2-threads"])
def compiled(request: pytest.FixtureRequest) -> object:
    """Everything here runs compiled; what is compared was computed by one thread."""
    with dispatch.force("cpu"):
        yield request.param
    torch.set_num_threads(1)


def depends_on_its_batch(run: Callable[[Tensor], Tensor], rows: Tensor, threads: int) -> bool:
    """Whether any row of `run` differs from that row alone, in batches of all COUNTS that begin anywhere."""
    torch.set_num_threads(1)
    alone = torch.cat([run(row) for row in rows.split_with_sizes([1] * len(rows))])
    torch.set_num_threads(threads)
    batches = [(start, start + count) for count in COUNTS for start in (0, 1, len(rows) - count)]
    return any(not torch.equal(run(rows[start:end]), alone[start:end]) for start, end in batches if end <= len(rows))


@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("in_features", "out_features"), [(63, 37), (700, 100), (256, 192)])
def test_linear(
    in_features: int, out_features: int, dtype: torch.dtype, compiled: int, generator: torch.Generator
) -> None:
    weight = pack(torch.randn(out_features, in_features, generator=generator).to(dtype))
    bias = torch.randn(out_features, generator=generator).to(dtype)
    rows = torch.randn(64, in_features, generator=generator).to(dtype)
    assert not depends_on_its_batch(lambda x: linear(x, weight, bias), rows, compiled)


def test_a_product_that_splits_its_sum_by_the_number_of_rows_is_noticed(
    compiled: int, generator: torch.Generator
) -> None:
    packed = pack(torch.randn(192, 256, generator=generator))
    weight = as_rows(packed)

    def split_when_wide(x: Tensor) -> Tensor:
        if len(x) < 64:
            return linear(x, packed)
        return linear(x[:, :128].contiguous(), pack(weight[:, :128].contiguous())) + linear(
            x[:, 128:].contiguous(), pack(weight[:, 128:].contiguous())
        )

    assert depends_on_its_batch(split_when_wide, torch.randn(64, 256, generator=generator), compiled)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm(dtype: torch.dtype, compiled: int, generator: torch.Generator) -> None:
    rows, weight = torch.randn(64, 600, generator=generator).to(dtype), torch.randn(300, generator=generator).to(dtype)

    def run(x: Tensor) -> Tensor:
        return torch.cat(rms_norm(x[:, :300].contiguous(), weight, 1e-6, x[:, 300:].contiguous()), dim=1)

    assert not depends_on_its_batch(run, rows, compiled)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_and_mul(dtype: torch.dtype, compiled: int, generator: torch.Generator) -> None:
    assert not depends_on_its_batch(silu_and_mul, torch.randn(64, 600, generator=generator).to(dtype), compiled)


def test_store_kv(compiled: int, generator: torch.Generator) -> None:
    """The last column of a row is its position."""
    cos_sin = torch.randn(64, 2, 8, generator=generator)
    rows = torch.cat((torch.randn(64, 64, generator=generator), torch.arange(64.0)[:, None]), dim=1)

    def run(x: Tensor) -> Tensor:
        query, key, value = x[:, :64].view(len(x), 4, 16).split_with_sizes([2, 1, 1], dim=1)
        pages, slots = empty_pages(16, 4, 1, 16, torch.float32), torch.arange(len(x))
        rotated = store_kv(query, key, value, cos_sin, x[:, 64].long(), pages, slots, 1)
        return torch.cat((rotated.flatten(1), pages[:, 1].transpose(1, 2).reshape(64, 32)[: len(x)]), dim=1)

    assert not depends_on_its_batch(run, rows, compiled)


IN_FEATURES, OUT_FEATURES, MODULES = 300, (100, 36, 70), (0, 1, 2)


@pytest.fixture
def tables(generator: torch.Generator) -> AdapterTables:
    ranks = (8, 1, 64, 24), ("bfloat16", "float32", "float16", "float32")
    adapters = [
        Adapter(
            dtype,
            {
                (0, module): random_lora(lora_rank, IN_FEATURES, OUT_FEATURES[module], dtype, 0.7, generator)
                for module in MODULES
            },
        )
        for lora_rank, dtype in zip(*ranks, strict=True)
    ]
    return build_tables(adapters, 1, 1024, generator)


def delta(
    x: Tensor,
    base: Tensor,
    tables: AdapterTables,
    lengths: list[int],
    adapters: list[int],
    out_features: tuple[int, ...] = OUT_FEATURES,
) -> Tensor:
    segments = build_segments(lengths, adapters)
    out = base.clone()
    shrunk = lora_shrink(x, tables, segments, 0, MODULES)
    lora_expand(shrunk, tables, segments, 0, MODULES, IN_FEATURES, out_features, out)
    return out


@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lora(dtype: torch.dtype, compiled: int, tables: AdapterTables, generator: torch.Generator) -> None:
    """Segments of 150, 1, 6 and 70 tokens and 13 of the base, against each token alone with its adapter."""
    lengths, adapters = [13, 150, 1, 6, 70], [-1, 2, 0, 3, 1]
    x = torch.randn(sum(lengths), IN_FEATURES, generator=generator).to(dtype)
    base = torch.randn(len(x), sum(OUT_FEATURES), generator=generator).to(dtype)
    torch.set_num_threads(compiled)
    together = delta(x, base, tables, lengths, adapters)
    torch.set_num_threads(1)
    owners = [adapter for length, adapter in zip(lengths, adapters, strict=True) for _ in range(length)]
    for token, adapter in enumerate(owners):
        row = slice(token, token + 1)
        assert torch.equal(delta(x[row], base[row], tables, [1], [adapter]), together[row])
    assert torch.equal(together[:13], base[:13])


@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize("page_bytes", [1024, 1 << 16], ids=lambda size: f"pages-of-{size}")
def test_lora_of_wide_rows(page_bytes: int, compiled: int, generator: torch.Generator) -> None:
    """Twelve tokens on twelve adapters read whole rows of B, one token alone reads them cut in columns."""
    widths, dtypes = (1100, 2048, 520), ("float32", "bfloat16", "float32", "float16")
    adapters = [
        Adapter(
            dtypes[index % 4],
            {
                (0, module): random_lora(index + 1, IN_FEATURES, widths[module], dtypes[index % 4], 0.7, generator)
                for module in MODULES
            },
        )
        for index in range(12)
    ]
    tables = build_tables(adapters, 1, page_bytes, generator)
    x = torch.randn(len(adapters), IN_FEATURES, generator=generator)
    base = torch.randn(len(adapters), sum(widths), generator=generator)
    torch.set_num_threads(compiled)
    together = delta(x, base, tables, [1] * len(adapters), list(range(len(adapters))), widths)
    torch.set_num_threads(1)
    for index in range(len(adapters)):
        row = slice(index, index + 1)
        assert torch.equal(delta(x[row], base[row], tables, [1], [index], widths), together[row])


HEADS, KV_HEADS, HEAD_DIM, CONTEXT = 6, 2, 20, 1100


@pytest.fixture(params=DTYPES, ids=str)
def paged(request: pytest.FixtureRequest, generator: torch.Generator) -> PagedContexts:
    return scatter([CONTEXT, 40], 16, KV_HEADS, HEAD_DIM, request.param, generator)


def attend(query: Tensor, paged: PagedContexts, end: int, window: int, neighbours: int = 0) -> Tensor:
    """The query tokens are the last of the first `end` tokens; with neighbours that decode before and behind."""
    page_table, context = paged.page_table, torch.tensor([end], dtype=torch.int32)
    order = [1] * neighbours + [0] + [1] * neighbours
    starts = torch.tensor([0] + [1] * neighbours + [len(query)] + [1] * neighbours).cumsum(0).to(torch.int32)
    contexts = torch.cat((paged.context_lens[order][:neighbours], context, paged.context_lens[order][neighbours + 1 :]))
    rows = torch.cat((query[:1].repeat(neighbours, 1, 1), query, query[:1].repeat(neighbours, 1, 1)))
    out = paged_attention(rows, paged.kv_pages, page_table[order], starts, contexts, paged.layer, 0.2, window)
    return out[neighbours : neighbours + len(query)]


@pytest.mark.parametrize("window", [0, 1, 100, 600], ids=lambda window: f"window-{window}")
def test_paged_attention(window: int, compiled: int, paged: PagedContexts, generator: torch.Generator) -> None:
    """A prompt at once, in chunks of 16 and 300, and tokens one by one, alone and among others."""
    query = torch.randn(CONTEXT, HEADS, HEAD_DIM, generator=generator).to(paged.kv_pages.dtype)
    torch.set_num_threads(1)
    whole = attend(query, paged, CONTEXT, window)
    torch.set_num_threads(compiled)
    for size in (16, 300):
        chunks = [attend(query[i : i + size], paged, min(i + size, CONTEXT), window) for i in range(0, CONTEXT, size)]
        assert torch.equal(torch.cat(chunks), whole)
    for position in (0, 1, 63, 64, 99, 100, 511, 512, 513, 700, 1023, 1024, CONTEXT - 1):
        for neighbours in (0, 1, 20):
            one = attend(query[position : position + 1], paged, position + 1, window, neighbours)
            assert torch.equal(one, whole[position : position + 1])
