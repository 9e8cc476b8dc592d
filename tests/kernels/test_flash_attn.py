"""What we say to FlashAttention, with a stand-in that reads it as its documentation does; the library needs a GPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.paged_attention import flash_attn
from kernels.paged_attention.libraries import HostIndices
from tests.kernels import libraries, test_paged_attention
from tests.kernels.kv_pool import PagedContexts, scatter

PAGE_SIZE, HEAD_DIM, SCALE = 256, test_paged_attention.HEAD_DIM, test_paged_attention.SCALE
DECODES = [(1, 40), (1, 257), (1, 512)]
PROMPTS = [(33, 38), (1, 300), (7, 7), (12, 266)]


class Calls(list[str]):
    """Which of the library's functions ran."""

    def spy(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            self.append(function.__name__)
            return function(*args, **kwargs)

        return call


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    found = Calls()
    functions = libraries.flash_attn_with_kvcache, libraries.flash_attn_varlen_func
    libraries.install(monkeypatch, "flash_attn", **{each.__name__: found.spy(each) for each in functions})
    return found


def scene(
    lengths: list[tuple[int, int]], generator: torch.Generator
) -> tuple[PagedContexts, Tensor, Tensor, HostIndices]:
    paged = scatter([context for _, context in lengths], PAGE_SIZE, 2, HEAD_DIM, torch.bfloat16, generator)
    starts = torch.tensor([0, *(new for new, _ in lengths)]).cumsum(0).int()
    query = torch.randn(int(starts[-1]), 6, HEAD_DIM, generator=generator).bfloat16()
    return paged, starts, query, HostIndices(paged.page_table, starts, paged.context_lens)


def assert_float64(
    lengths: list[tuple[int, int]], window: int, generator: torch.Generator, *, has_host: bool, off_by: int = 0
) -> None:
    paged, starts, query, host = scene(lengths, generator)
    out = flash_attn.paged_attention_flash_attn(
        *(query, paged.kv_pages, paged.page_table, starts, paged.context_lens, paged.layer, SCALE, window),
        host if has_host else None,
    )
    values, bounds = test_paged_attention.expected(query, paged, lengths, window + off_by)
    assert out.shape == query.shape
    assert out.dtype == query.dtype
    assert ((out - values).abs() <= bounds).all()


@pytest.mark.parametrize("window", [0, 1, 5, 260], ids=lambda window: f"window-{window}")
@pytest.mark.parametrize("has_host", [True, False], ids=["eager", "graph"])
def test_decodes_read_the_pages_as_they_lie(
    has_host: bool, window: int, calls: Calls, generator: torch.Generator
) -> None:
    assert_float64(DECODES, window, generator, has_host=has_host)
    assert calls == ["flash_attn_with_kvcache"]


@pytest.mark.parametrize("window", [0, 1, 5, 260], ids=lambda window: f"window-{window}")
def test_prompts_beside_decodes(window: int, calls: Calls, generator: torch.Generator) -> None:
    assert_float64(PROMPTS, window, generator, has_host=True)
    assert calls == ["flash_attn_varlen_func"]


@pytest.mark.parametrize("lengths", [DECODES, PROMPTS], ids=["decodes", "prompts"])
def test_control_a_window_that_is_off_by_one_is_noticed(
    lengths: list[tuple[int, int]], generator: torch.Generator
) -> None:
    with pytest.raises(AssertionError):
        assert_float64(lengths, 5, generator, has_host=True, off_by=1)


def test_as_many_tokens_as_sequences_is_not_yet_a_batch_of_decodes(calls: Calls, generator: torch.Generator) -> None:
    assert_float64([(2, 9), (0, 5), (1, 3)], 0, generator, has_host=True)
    assert calls == ["flash_attn_varlen_func"]


REFUSED = {
    "pages": (torch.bfloat16, 16, 128, "pages of a multiple of 256 tokens, and these have 16: set --page-size 256"),
    "dtype": (torch.float32, 256, 128, "bfloat16 and float16, and the model runs in float32"),
    "wide-heads": (torch.float16, 256, 264, "heads of a multiple of 8 up to 256 elements, and the model's have 264"),
    "odd-heads": (torch.float16, 256, 100, "heads of a multiple of 8 up to 256 elements, and the model's have 100"),
}


@pytest.mark.parametrize(("dtype", "page_size", "head_dim", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_with_a_sentence(
    dtype: torch.dtype, page_size: int, head_dim: int, sentence: str
) -> None:
    assert flash_attn.refusal(dtype, page_size, head_dim) == f"flash_attn takes {sentence}"


@pytest.mark.parametrize("page_size", [256, 512])
@pytest.mark.parametrize("dtype", flash_attn.DTYPES, ids=str)
def test_what_fits_is_taken(dtype: torch.dtype, page_size: int) -> None:
    assert flash_attn.refusal(dtype, page_size, 128) == ""


def test_control_the_stand_in_refuses_pages_of_sixteen_tokens(generator: torch.Generator) -> None:
    paged = scatter([20], 16, 2, HEAD_DIM, torch.bfloat16, generator)
    query, starts = torch.zeros(1, 6, HEAD_DIM).bfloat16(), torch.tensor([0, 1]).int()
    with pytest.raises(AssertionError, match="divisible by 256"):
        flash_attn.paged_attention_flash_attn(
            query, paged.kv_pages, paged.page_table, starts, paged.context_lens, paged.layer, SCALE, 0, None
        )
