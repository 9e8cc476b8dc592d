import pytest
import torch
from torch import Tensor

from kernels.store_kv import store_kv
from tests.kernels.kv_pool import empty_pages

pytestmark = pytest.mark.usefixtures("backend")

HEAD_DIM, MAX_POSITIONS, LAYER = 16, 64, 1
EPS = torch.finfo(torch.float32).eps


def angles() -> Tensor:
    """`[max_positions, head_dim / 2]` float64, no two columns alike."""
    return torch.arange(MAX_POSITIONS).double()[:, None] * 0.7 ** torch.arange(HEAD_DIM // 2).double()


def cos_sin() -> Tensor:
    return torch.stack((angles().cos(), angles().sin()), dim=1).float()


def expected_rotation(x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Each pair (i, i + head_dim / 2) as a complex number turned by its angle, in float64, and its bound: the table
    is rounded to float32, two products and a sum make 3 * eps of their magnitudes, then one rounding to x's dtype."""
    half = HEAD_DIM // 2
    pairs = torch.complex(x[..., :half].double(), x[..., half:].double())
    turned = pairs * torch.polar(torch.ones(1, dtype=torch.float64), angles()[positions])[:, None]
    values = torch.cat((turned.real, turned.imag), dim=-1)
    magnitude = (pairs.real.abs() + pairs.imag.abs()).repeat(1, 1, 2)
    return values, 3 * EPS * magnitude + torch.finfo(x.dtype).eps * values.abs()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("page_size", [4, 16], ids=lambda size: f"pages-of-{size}")
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 2), (5, 1)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("num_tokens", [1, 7, 33], ids=lambda count: f"{count}-tokens")
def test_rotates_and_stores(
    num_tokens: int, num_heads: int, num_kv_heads: int, page_size: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    # one row per token holds query, key and value side by side, as the fused projection leaves them
    fused = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, HEAD_DIM, generator=generator).to(dtype)
    query, key, value = fused.split_with_sizes([num_heads, num_kv_heads, num_kv_heads], dim=1)
    positions = torch.randint(MAX_POSITIONS, (num_tokens,), generator=generator)
    pages = empty_pages(12, page_size, num_kv_heads, HEAD_DIM, dtype)
    slots = torch.randperm(12 * page_size, generator=generator)[:num_tokens]

    rotated = store_kv(query, key, value, cos_sin(), positions, pages, slots, LAYER)

    for got, x in ((rotated, query), (pages[slots // page_size, LAYER, 0, slots % page_size], key)):
        values, bounds = expected_rotation(x, positions)
        assert got.dtype == dtype
        assert ((got - values).abs() <= bounds).all()
    assert torch.equal(pages[slots // page_size, LAYER, 1, slots % page_size], value)
    assert int(pages.isfinite().sum()) == 2 * num_tokens * num_kv_heads * HEAD_DIM  # nothing else was written


def test_a_shifted_position_is_noticed(generator: torch.Generator) -> None:
    query, key, value = torch.randn(3, 7, 2, HEAD_DIM, generator=generator).unbind(0)
    pages, positions = empty_pages(2, 4, 2, HEAD_DIM, torch.float32), torch.arange(7)
    rotated = store_kv(query, key, value, cos_sin(), positions, pages, torch.arange(7), LAYER)
    values, bounds = expected_rotation(query, positions + 1)
    assert not ((rotated - values).abs() <= bounds).all()


def test_keys_are_kept_in_the_pages_dtype(generator: torch.Generator) -> None:
    query, key, value = torch.randn(3, 7, 2, HEAD_DIM, generator=generator).unbind(0)
    pages = empty_pages(2, 4, 2, HEAD_DIM, torch.bfloat16)
    rotated = store_kv(query, key, value, cos_sin(), torch.arange(7), pages, torch.arange(7), LAYER)
    assert rotated.dtype == torch.float32
    assert torch.equal(pages[:, LAYER, 1].flatten(0, 1)[:7], value.bfloat16())
