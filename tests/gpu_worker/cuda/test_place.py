"""What puts an engine on a GPU, with a processor in its place."""

import logging
from typing import Any

import pytest
import torch

from benchmarks.kernels.models import Size, make_decoder
from gpu_worker.batch import ForwardBatch
from gpu_worker.cuda import place as placing
from gpu_worker.cuda.executor import call_again
from gpu_worker.memory.geometry import PageGeometry
from gpu_worker.memory.pool import PagePool
from gpu_worker.models import Decoder
from kernels import dispatch
from kernels.adapters import Segments
from tests.kernels.libraries import install

SIZE = Size(hidden=32, layers=2, heads=4, kv_heads=2, intermediate=48, vocab=61)
GEOMETRY = PageGeometry(SIZE.layers, SIZE.kv_heads, SIZE.head_dim, element_bytes=4, page_size=4)
NUM_PAGES = 6


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    torch.manual_seed(3)
    return make_decoder(SIZE, max_context_tokens=64)


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """(pages, device) of every pool that was asked for; each is on the CPU, and a graph is a function."""
    asked: list[tuple[int, str]] = []

    def pool(geometry: PageGeometry, num_pages: int, device: str) -> PagePool:
        asked.append((num_pages, device))
        return PagePool(geometry, num_pages, "cpu")

    monkeypatch.setattr(placing, "PagePool", pool)
    monkeypatch.setattr(placing, "CudaGraphs", lambda: call_again)
    return asked


def decode(kv_pages: torch.Tensor, sequences: int) -> ForwardBatch:
    rows, ones = torch.arange(sequences), torch.ones(sequences, dtype=torch.int32)
    starts = torch.arange(sequences + 1, dtype=torch.int32)
    segments = Segments(torch.tensor([0, sequences], dtype=torch.int32), torch.tensor([-1], dtype=torch.int32))
    return ForwardBatch(
        *(rows, torch.zeros_like(rows), rows * GEOMETRY.page_size, rows[:, None].int(), starts, ones, rows, segments),
        adapters=None,
        kv_pages=kv_pages,
        decode_only=True,
    )


def test_the_page_behind_those_of_the_manager_is_the_executors(decoder: Decoder, pools: list[tuple[int, str]]) -> None:
    """Three decodes run in a graph of four rows: the fourth writes into that page, and nobody into the others."""
    pool, executor = placing.place(decoder, GEOMETRY, NUM_PAGES, max_sequences=8)
    assert pools == [(NUM_PAGES + 1, "cuda")]
    assert len(pool.bytes) == NUM_PAGES + 1
    pool.bytes.fill_(0xFF)
    with torch.inference_mode():
        logits = executor.forward(decode(pool.kv_pages(decoder.dtype), 3))
    assert logits.isfinite().all()
    written = (pool.bytes != 0xFF).any(dim=1)
    assert written.tolist() == [True] * 3 + [False] * (NUM_PAGES - 3) + [True]


def test_a_library_that_is_there_and_not_used_is_logged(
    decoder: Decoder, pools: list[tuple[int, str]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(monkeypatch, "flash_attn")
    with caplog.at_level(logging.WARNING):
        placing.place(decoder, GEOMETRY, NUM_PAGES, max_sequences=8)
    assert [record.getMessage() for record in caplog.records] == [
        "an attention library is not used: flash_attn takes bfloat16 and float16, and the model runs in float32"
    ]


def test_the_one_that_was_named_and_cannot_be_used_ends_the_start(
    decoder: Decoder, pools: list[tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "flash_attn")
    monkeypatch.setattr(dispatch, "_attention", "flash_attn")
    with pytest.raises(ValueError, match="LORAPLEX_ATTENTION is 'flash_attn'"):
        placing.place(decoder, GEOMETRY, NUM_PAGES, max_sequences=8)
    assert pools == []


def test_the_pool_takes_its_share_less_what_the_largest_step_was_seen_to_take(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of 100 tokens is measured as one of the 64 that a context holds, and scaled."""
    seen: list[ForwardBatch] = []
    forward = decoder.forward

    def watched(batch: ForwardBatch) -> torch.Tensor:
        seen.append(batch)
        return forward(batch)

    stand_ins: dict[str, Any] = {
        "empty_cache": lambda: None,
        "mem_get_info": lambda: (1 << 20, 1 << 21),
        "memory_allocated": lambda: 5000,
        "reset_peak_memory_stats": lambda: None,
        "max_memory_allocated": lambda: 5000 + 6400,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(decoder, "forward", watched)
    found = placing.profiled_pool_bytes(decoder, GEOMETRY, 0.5, max_step_tokens=100, max_sequences=8)
    assert found == (1 << 19) - 10_000
    (batch,) = seen
    assert len(batch.token_ids) == 64
    assert len(batch.logit_rows) == 8
