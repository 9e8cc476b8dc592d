"""What we say to FlashInfer, with a stand-in that reads it as its documentation does; the library needs a GPU."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import dispatch
from kernels.gpu import tiles
from kernels.paged_attention import flashinfer, paged_attention
from kernels.paged_attention.reference import paged_attention_reference
from tests.kernels.kv_pool import PagedContexts, scatter

LENGTHS = [(1, 40), (33, 38), (7, 7), (12, 16)]
PAGE_SIZE = 4


class Wrapper:
    """Rebuilds page tables from the lists and asks the reference."""

    plans = 0

    def __init__(self, workspace: Tensor, layout: str) -> None:
        assert layout == "NHD"

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        *,
        page_size: int,
        causal: bool,
        sm_scale: float,
        window_left: int,
        **others: Any,
    ) -> None:
        assert causal
        Wrapper.plans += 1
        counts = paged_kv_indptr.diff()
        self.table = torch.zeros(len(counts), int(counts.max()), dtype=torch.int32)
        for row, pages in enumerate(paged_kv_indices.split_with_sizes(counts.tolist())):
            self.table[row, : len(pages)] = pages
        self.starts, self.scale, self.window = qo_indptr, sm_scale, window_left + 1
        self.contexts = (counts - 1) * page_size + paged_kv_last_page_len

    def run(self, query: Tensor, cache: tuple[Tensor, Tensor]) -> Tensor:
        pages = torch.stack(cache, dim=1)[:, None]
        return paged_attention_reference(
            query, pages, self.table, self.starts, self.contexts.int(), 0, self.scale, self.window
        )


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("flashinfer")
    module.BatchPrefillWithPagedKVCacheWrapper = Wrapper  # type: ignore[attr-defined]  # made here
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(flashinfer, "_planned", {})
    monkeypatch.setattr(Wrapper, "plans", 0)


def scene(generator: torch.Generator) -> tuple[PagedContexts, Tensor, Tensor]:
    paged = scatter([context for _, context in LENGTHS], PAGE_SIZE, 2, 64, torch.bfloat16, generator)
    starts = torch.tensor([0, *(new for new, _ in LENGTHS)]).cumsum(0).int()
    return paged, starts, torch.randn(int(starts[-1]), 4, 64, generator=generator).bfloat16()


@pytest.mark.parametrize("window", [0, 1, 5], ids=lambda window: f"window-{window}")
def test_it_is_told_the_same_attention(window: int, generator: torch.Generator) -> None:
    paged, starts, query = scene(generator)
    arguments = query, paged.kv_pages, paged.page_table, starts, paged.context_lens, paged.layer, 0.1, window
    assert torch.equal(flashinfer.paged_attention_flashinfer(*arguments), paged_attention_reference(*arguments))


def test_the_layers_of_a_step_share_a_plan(generator: torch.Generator) -> None:
    paged, starts, query = scene(generator)
    for step_starts in (starts, starts.clone()):
        for layer in (1, 1):
            arguments = query, paged.kv_pages, paged.page_table, step_starts, paged.context_lens, layer, 0.1, 0
            flashinfer.paged_attention_flashinfer(*arguments)
    assert Wrapper.plans == 2


def test_page_lists_leave_out_what_is_behind_a_context() -> None:
    table = torch.tensor([[7, 3, 99], [5, 99, 99]], dtype=torch.int32)
    indptr, pages, last = flashinfer.page_lists(table, torch.tensor([8, 1], dtype=torch.int32), 4)
    assert (indptr.tolist(), pages.tolist(), last.tolist()) == ([0, 2, 3], [7, 3, 5], [4, 1])


def test_it_takes_prompts_in_16_bits_and_nothing_deterministic() -> None:
    query, pages = torch.zeros(2, 4, 64).bfloat16(), torch.zeros(1, 1, 2, 4, 2, 64).bfloat16()
    assert flashinfer.supports(query, pages, decode_only=False)
    assert not flashinfer.supports(query, pages, decode_only=True)
    assert not flashinfer.supports(query.float(), pages.float(), decode_only=False)
    assert not flashinfer.supports(query[..., :24], pages[..., :24], decode_only=False)
    tiles.set_deterministic(True)
    try:
        assert not flashinfer.supports(query, pages, decode_only=False)
    finally:
        tiles.set_deterministic(False)


def test_on_a_cpu_it_is_never_asked(generator: torch.Generator) -> None:
    paged, starts, query = scene(generator)
    paged_attention(query, paged.kv_pages, paged.page_table, starts, paged.context_lens, paged.layer, 0.1)
    assert Wrapper.plans == 0
    assert not dispatch.use_flashinfer(query)
