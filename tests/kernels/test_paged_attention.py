import math

import pytest
import torch
from torch import Tensor

from kernels.paged_attention import paged_attention
from tests.kernels.kv_pool import PagedContexts, scatter

pytestmark = pytest.mark.usefixtures("backend")

HEAD_DIM = 24
SCALE = HEAD_DIM**-0.5
EPS = torch.finfo(torch.float32).eps

# (query tokens, context) of each sequence
BATCHES = {
    "one-decode": [(1, 1)],
    "decodes": [(1, 7), (1, 33), (1, 16)],
    "whole-prefill": [(33, 33)],
    "chunks": [(7, 20), (1, 1), (12, 16)],
    "mixed-with-an-empty-one": [(1, 40), (0, 5), (33, 38), (7, 7)],
}
HEADS = {"mha-4": (4, 4), "gqa-6-over-2": (6, 2), "mqa-5-over-1": (5, 1)}


def expected(
    query: Tensor, paged: PagedContexts, lengths: list[tuple[int, int]], sliding_window: int
) -> tuple[Tensor, Tensor]:
    """Attention token by token and head by head in float64, and the bound of a float32 computation.

    A score is off by at most d = (head_dim + 2) * eps * scale * |q||k|, which changes each weight by 2 d relative
    (numerator and denominator); exponential, sums over c keys and the division add (2 c + 8) * eps; the result is
    rounded to the query's dtype.
    """
    values, bounds = torch.zeros(query.shape, dtype=torch.float64), torch.zeros(query.shape, dtype=torch.float64)
    group, token = query.shape[1] // paged.keys[0].shape[1], 0
    for sequence, (num_queries, context) in enumerate(lengths):
        for position in range(context - num_queries, context):
            first = max(0, position + 1 - sliding_window) if sliding_window else 0
            for head in range(query.shape[1]):
                q = query[token, head].double()
                k = paged.keys[sequence][first : position + 1, head // group].double()
                v = paged.values[sequence][first : position + 1, head // group].double()
                weights = [math.exp(score) for score in (SCALE * (k @ q)).tolist()]
                p = torch.tensor(weights, dtype=torch.float64) / sum(weights)
                d = (HEAD_DIM + 2) * EPS * SCALE * float((k.abs() @ q.abs()).max())
                values[token, head] = p @ v
                bounds[token, head] = (2 * d + (2 * len(k) + 8) * EPS) * (p @ v.abs())
            token += 1
    return values, bounds + torch.finfo(query.dtype).eps * values.abs()


def assert_attends(
    paged: PagedContexts,
    lengths: list[tuple[int, int]],
    num_heads: int,
    generator: torch.Generator,
    sliding_window: int = 0,
    expected_window: int | None = None,
) -> None:
    starts = torch.tensor([0, *(num_queries for num_queries, _ in lengths)]).cumsum(0).to(torch.int32)
    query = torch.randn(int(starts[-1]), num_heads, HEAD_DIM, generator=generator).to(paged.kv_pages.dtype)
    pages, table, contexts = paged.kv_pages, paged.page_table, paged.context_lens
    out = paged_attention(query, pages, table, starts, contexts, paged.layer, SCALE, sliding_window)
    values, bounds = expected(query, paged, lengths, sliding_window if expected_window is None else expected_window)
    assert out.dtype == query.dtype
    assert ((out - values).abs() <= bounds).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("page_size", [4, 16], ids=lambda size: f"pages-of-{size}")
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
def test_full_attention(
    lengths: list[tuple[int, int]],
    num_heads: int,
    num_kv_heads: int,
    page_size: int,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> None:
    contexts = [context for _, context in lengths]
    paged = scatter(contexts, page_size, num_kv_heads, HEAD_DIM, dtype, generator)
    assert_attends(paged, lengths, num_heads, generator)


@pytest.mark.parametrize("sliding_window", [1, 3, 16, 100], ids=lambda window: f"window-{window}")
@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
def test_sliding_window(lengths: list[tuple[int, int]], sliding_window: int, generator: torch.Generator) -> None:
    paged = scatter([context for _, context in lengths], 4, 2, HEAD_DIM, torch.float32, generator)
    assert_attends(paged, lengths, 4, generator, sliding_window)


@pytest.mark.parametrize("sliding_window", [2, 4], ids=lambda window: f"window-{window}")
def test_a_window_off_by_one_is_noticed(sliding_window: int, generator: torch.Generator) -> None:
    paged = scatter([20], 4, 2, HEAD_DIM, torch.float32, generator)
    with pytest.raises(AssertionError):
        assert_attends(paged, [(7, 20)], 4, generator, sliding_window, expected_window=3)


def test_swapped_pages_are_noticed(generator: torch.Generator) -> None:
    paged = scatter([20], 4, 2, HEAD_DIM, torch.float32, generator)
    # a page that every query sees and one that some do not: order among fully visible keys does not matter
    paged.page_table[0, 3:5] = paged.page_table[0, 3:5].flip(0)
    with pytest.raises(AssertionError):
        assert_attends(paged, [(7, 20)], 4, generator)
