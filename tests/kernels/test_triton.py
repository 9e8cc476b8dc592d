"""What the tests of every backend do not reach in the Triton kernels: splits, merges, offsets beyond 2^31, tiles."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels import dispatch
from kernels.gpu import tiles
from kernels.linear import linear
from kernels.lora_shrink import lora_shrink
from kernels.paged_attention import paged_attention
from kernels.store_kv import store_kv
from tests.kernels import test_linear, test_lora_expand, test_lora_shrink, test_paged_attention
from tests.kernels.adapter_pool import build_segments, build_tables
from tests.kernels.kv_pool import scatter

pytestmark = pytest.mark.triton

SHRINK = {"BLOCK_T": 16, "BLOCK_R": 16, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2}
EXPAND = {"BLOCK_T": 16, "BLOCK_R": 16, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
ATTENTION = {"BLOCK_M": 16, "BLOCK_N": 8, "CHUNK": 16, "num_warps": 4, "num_stages": 2}


@pytest.fixture(autouse=True)
def in_triton() -> Iterator[None]:
    with dispatch.force("triton"):
        yield


@pytest.fixture
def small_chunks() -> Iterator[None]:
    """Contexts of a few dozen tokens have several chunks."""
    with (
        tiles.force("paged_attention", tiles.DECODE, ATTENTION),
        tiles.force("paged_attention", tiles.PREFILL, ATTENTION),
    ):
        yield


@pytest.mark.parametrize("lengths", [[1], [16], [0, 1, 0, 17, 33, 0], [1] * 9, [15, 16, 17, 31, 32]], ids=str)
@pytest.mark.parametrize("block", [1, 16, 21], ids=lambda block: f"tiles-of-{block}")
def test_tiles_cover_every_row_once_and_never_cross(lengths: list[int], block: int) -> None:
    from kernels.gpu.adapters import num_tiles
    from tests.kernels.cover import cover_kernel

    starts = build_segments(lengths, [0] * len(lengths)).starts
    owners = torch.full((sum(lengths),), -1, dtype=torch.int32)
    visits = torch.zeros(sum(lengths), dtype=torch.int32)
    cover_kernel[(num_tiles(sum(lengths), len(lengths), block),)](starts, len(lengths), owners, visits, BLOCK=block)
    assert visits.tolist() == [1] * sum(lengths)
    assert owners.tolist() == [run for run, length in enumerate(lengths) for _ in range(length)]


@pytest.mark.parametrize("split", [1, 2, 4], ids=lambda split: f"split-{split}")
def test_a_shrink_split_over_the_features(split: int, generator: torch.Generator) -> None:
    """100 features are 2 blocks of 64: of 4 parts some have nothing to add."""
    adapters = test_lora_shrink.make_adapters([8, 24, 3], ["bfloat16", "float32", "float16"], generator)
    tables = build_tables(adapters, test_lora_shrink.LAYERS, 1024, generator)
    segments = build_segments([17, 3, 1, 12], [2, -1, 0, 1])
    x = torch.randn(33, test_lora_shrink.IN_FEATURES, generator=generator).bfloat16()
    with tiles.force("lora_shrink", tiles.DECODE, SHRINK | {"SPLIT_K": split}):
        test_lora_shrink.assert_shrinks(x, adapters, tables, segments, 0, test_lora_shrink.QKV)


@pytest.mark.parametrize("rank_block", [16, 32], ids=lambda size: f"{size}-ranks-at-a-time")
def test_an_expand_in_other_tiles(rank_block: int, generator: torch.Generator) -> None:
    adapters = test_lora_expand.make_adapters([24, 64], ["bfloat16", "float32"], generator)
    tables = build_tables(adapters, test_lora_expand.LAYERS, 1024, generator)
    with tiles.force("lora_expand", tiles.DECODE, EXPAND | {"BLOCK_R": rank_block}):
        segments = build_segments([17, 3], [0, 1])
        test_lora_expand.assert_expands(adapters, tables, segments, 0, test_lora_expand.QKV, generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(("rows", "in_features", "out_features"), [(1, 63, 37), (7, 100, 192), (67, 64, 1)], ids=str)
def test_the_product_of_deterministic(
    rows: int, in_features: int, out_features: int, has_bias: bool, dtype: torch.dtype, generator: torch.Generator
) -> None:
    x = torch.randn(rows, in_features, generator=generator).to(dtype)
    weight = torch.randn(out_features, in_features, generator=generator).to(dtype)
    bias = torch.randn(out_features, generator=generator).to(dtype) if has_bias else None
    values, bounds = test_linear.expected(x, weight, bias)
    out = linear(x, weight, bias)
    assert out.dtype == dtype
    assert ((out - values).abs() <= bounds + torch.finfo(dtype).eps / 2 * values.abs()).all()


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("sliding_window", [0, 3, 20], ids=lambda window: f"window-{window}")
@pytest.mark.parametrize("lengths", [[(1, 40), (33, 38), (7, 20), (1, 16), (1, 17)], [(1, 33)]], ids=["mixed", "one"])
def test_chunks_of_a_context_are_merged(
    lengths: list[tuple[int, int]], sliding_window: int, generator: torch.Generator
) -> None:
    paged = scatter([context for _, context in lengths], 4, 2, test_paged_attention.HEAD_DIM, torch.float32, generator)
    test_paged_attention.assert_attends(paged, lengths, 6, generator, sliding_window)


@pytest.mark.usefixtures("small_chunks")
def test_a_prompt_has_the_same_chain_of_sums_however_it_is_cut(generator: torch.Generator) -> None:
    """In the interpreter a tile of queries is one product, so that tiles of one size can be compared bit by bit."""
    paged = scatter([48], 4, 1, 16, torch.float32, generator)
    query = torch.randn(48, 1, 16, generator=generator)
    pages, table, layer = paged.kv_pages, paged.page_table, paged.layer

    def attend(start: int, end: int) -> Tensor:
        starts, context = torch.tensor([0, end - start]).int(), torch.tensor([end]).int()
        return paged_attention(query[start:end], pages, table, starts, context, layer, 0.25)

    assert torch.equal(torch.cat([attend(start, start + 16) for start in (0, 16, 32)]), attend(0, 48))


def test_a_batch_of_decodes_may_be_announced(generator: torch.Generator) -> None:
    paged = scatter([20, 7], 4, 2, 16, torch.float32, generator)
    query, starts = torch.randn(2, 4, 16, generator=generator), torch.arange(3, dtype=torch.int32)
    arguments = query, paged.kv_pages, paged.page_table, starts, paged.context_lens, paged.layer, 0.25
    assert torch.equal(paged_attention(*arguments, decode_only=True), paged_attention(*arguments))


# Pages whose first byte is beyond 2^31, in a pool of address space that nobody touches elsewhere.
FAR_PAGE_BYTES = 1 << 28
FAR_PAGES = 18


def test_adapters_beyond_two_gigabytes(generator: torch.Generator) -> None:
    adapters = test_lora_shrink.make_adapters([3], ["bfloat16"], generator)
    near = build_tables(adapters, test_lora_shrink.LAYERS, 1 << 20, generator)
    pool = torch.empty(FAR_PAGES, FAR_PAGE_BYTES, dtype=torch.uint8)
    pool[-1, : 1 << 20] = near.pool[int(near.page_table[0, 0])]
    far = replace(near, pool=pool, page_table=torch.full_like(near.page_table, FAR_PAGES - 1))
    x = torch.randn(2, test_lora_shrink.IN_FEATURES, generator=generator)
    segments = build_segments([2], [0])
    assert torch.equal(
        lora_shrink(x, far, segments, 1, test_lora_shrink.QKV), lora_shrink(x, near, segments, 1, test_lora_shrink.QKV)
    )


def test_keys_and_values_beyond_two_gigabytes(generator: torch.Generator) -> None:
    pool = torch.empty(FAR_PAGES, FAR_PAGE_BYTES, dtype=torch.uint8)
    shape = 1, 2, 4, 1, 16
    pages = pool[:, : torch.Size(shape).numel() * 4].view(torch.float32).view(-1, *shape)
    query, key, value = torch.randn(3, 1, 1, 16, generator=generator).unbind(0)
    cos_sin = torch.stack((torch.ones(1, 8), torch.zeros(1, 8)), dim=1)
    slot = torch.tensor([(FAR_PAGES - 1) * 4 + 2])
    store_kv(query, key, value, cos_sin, torch.zeros(1, dtype=torch.int64), pages, slot, 0)
    assert torch.equal(pages[-1, 0, :, 2, 0], torch.cat((key[0], value[0])))
    # one key: its value comes out, whatever the query is
    pages[-1, 0, :, 0] = pages[-1, 0, :, 2]
    table, one = torch.tensor([[FAR_PAGES - 1]]).int(), torch.tensor([1]).int()
    out = paged_attention(query, pages, table, torch.tensor([0, 1]).int(), one, 0, 0.25)
    assert torch.equal(out, value)
