"""What we say to FlashInfer, with a stand-in that reads it as its documentation does; the library needs a GPU."""

from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import dispatch
from kernels.paged_attention import flashinfer, paged_attention
from kernels.paged_attention.libraries import HostIndices
from tests.kernels import libraries
from tests.kernels.kv_pool import PagedContexts, scatter

LENGTHS = [(1, 40), (33, 38), (7, 7), (12, 16)]
PAGE_SIZE = 4


class Wrapper:
    """Rebuilds page tables from the lists and attends in float64."""

    made: ClassVar[list["Wrapper"]] = []

    def __init__(self, workspace: Tensor, layout: str) -> None:
        assert layout == "NHD"
        self.workspace = workspace
        self.plans: list[int] = []
        Wrapper.made.append(self)

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool,
        sm_scale: float,
        window_left: int,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        assert causal
        for indices in (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len):
            assert indices.dtype == torch.int32
            assert indices.device.type == "cpu"
        self.heads = num_qo_heads, num_kv_heads, head_dim_qk, q_data_type, kv_data_type
        self.plans.append(window_left)
        self.lists = qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len
        self.page_size, self.scale, self.window = page_size, sm_scale, window_left

    def run(self, query: Tensor, cache: tuple[Tensor, Tensor]) -> Tensor:
        key, value = cache
        assert self.heads == (query.shape[1], key.shape[2], query.shape[2], query.dtype, key.dtype)
        assert key.shape[1] == self.page_size
        starts, bounds, pages, last = (part.tolist() for part in self.lists)
        rows = []
        for row, tail in enumerate(last):
            own = torch.tensor(pages[bounds[row] : bounds[row + 1]])
            context = (len(own) - 1) * self.page_size + tail
            k, v = (libraries.gathered(side, own, context) for side in (key, value))
            rows.append(libraries.attend(query[starts[row] : starts[row + 1]], k, v, self.scale, self.window))
        return torch.cat(rows)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    libraries.install(monkeypatch, "flashinfer", BatchPrefillWithPagedKVCacheWrapper=Wrapper)
    monkeypatch.setattr(flashinfer, "_plans", {})
    monkeypatch.setattr(Wrapper, "made", [])


def scene(generator: torch.Generator) -> tuple[PagedContexts, Tensor, Tensor, HostIndices]:
    paged = scatter([context for _, context in LENGTHS], PAGE_SIZE, 2, 64, torch.bfloat16, generator)
    starts = torch.tensor([0, *(new for new, _ in LENGTHS)]).cumsum(0).int()
    query = torch.randn(int(starts[-1]), 4, 64, generator=generator).bfloat16()
    return paged, starts, query, HostIndices(paged.page_table, starts, paged.context_lens)


def run(paged: PagedContexts, starts: Tensor, query: Tensor, host: HostIndices, window: int = 0) -> Tensor:
    where = paged.kv_pages, paged.page_table, starts, paged.context_lens, paged.layer
    return flashinfer.paged_attention_flashinfer(query, *where, 0.1, window, host)


@pytest.mark.parametrize("window", [0, 1, 5], ids=lambda window: f"window-{window}")
def test_it_is_told_the_same_attention(window: int, generator: torch.Generator) -> None:
    paged, starts, query, host = scene(generator)
    out, start = run(paged, starts, query, host, window), 0
    for row, (new, _) in enumerate(LENGTHS):
        wanted = libraries.attend(query[start : start + new], paged.keys[row], paged.values[row], 0.1, window - 1)
        assert torch.equal(out[start : start + new], wanted)
        start += new


def test_the_layers_of_a_step_share_a_plan_and_each_window_has_its_own(generator: torch.Generator) -> None:
    paged, starts, query, host = scene(generator)
    for window in (0, 5, 0, 5):
        run(paged, starts, query, host, window)
    assert [wrapper.plans for wrapper in Wrapper.made] == [[-1], [4]]


def test_a_plan_is_not_written_over_while_the_step_before_may_read_it(generator: torch.Generator) -> None:
    paged, starts, query, _ = scene(generator)
    for _ in range(4):
        run(paged, starts, query, HostIndices(paged.page_table, starts, paged.context_lens))
    assert [len(wrapper.plans) for wrapper in Wrapper.made] == [2, 2]
    assert Wrapper.made[0].workspace is Wrapper.made[1].workspace


def test_nothing_on_the_device_is_read(generator: torch.Generator) -> None:
    """Fake tensors raise when somebody asks for their numbers."""
    paged, starts, query, host = scene(generator)
    with FakeTensorMode(allow_non_fake_inputs=True):
        table, begins, contexts = (
            torch.empty_like(tensor) for tensor in (paged.page_table, starts, paged.context_lens)
        )
    out = flashinfer.paged_attention_flashinfer(
        query, paged.kv_pages, table, begins, contexts, paged.layer, 0.1, 0, host
    )
    assert torch.equal(out, run(paged, starts, query, host))


def test_without_indices_on_the_host_it_refuses(generator: torch.Generator) -> None:
    paged, starts, query, _ = scene(generator)
    where = paged.kv_pages, paged.page_table, starts, paged.context_lens, paged.layer
    with pytest.raises(ValueError, match="indices on the host"):
        flashinfer.paged_attention_flashinfer(query, *where, 0.1, 0, None)


def test_page_lists_leave_out_what_is_behind_a_context() -> None:
    table = torch.tensor([[7, 3, 99], [5, 99, 99]], dtype=torch.int32)
    indptr, pages, last = flashinfer.page_lists(table, torch.tensor([8, 1], dtype=torch.int32), 4)
    assert (indptr.tolist(), pages.tolist(), last.tolist()) == ([0, 2, 3], [7, 3, 5], [4, 1])


def test_it_takes_16_bits_and_heads_of_three_sizes() -> None:
    assert flashinfer.refusal(torch.bfloat16, 16, 128) == ""
    assert "the model runs in float32" in flashinfer.refusal(torch.float32, 16, 128)
    assert "64, 128 or 256 elements, and the model's have 24" in flashinfer.refusal(torch.bfloat16, 16, 24)


def test_on_a_cpu_it_is_never_asked(generator: torch.Generator) -> None:
    paged, starts, query, host = scene(generator)
    calls = dispatch.calls["paged_attention", "flashinfer"]
    paged_attention(query, paged.kv_pages, paged.page_table, starts, paged.context_lens, paged.layer, 0.1, host=host)
    assert (Wrapper.made, dispatch.calls["paged_attention", "flashinfer"]) == ([], calls)
