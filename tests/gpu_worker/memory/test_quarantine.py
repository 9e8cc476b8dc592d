"""What the quarantine is for, shown with steps that write late: the pages of a launched step are nobody else's."""

from collections.abc import Sequence

import pytest

from gpu_worker.memory.allocator import PageAllocator
from gpu_worker.memory.manager import MemoryManager
from tests.gpu_worker.support import SMALL_PAGES, layout_of_pages

NUM_PAGES = 6
PAGE = SMALL_PAGES.page_size


class Careless(PageAllocator):
    """Frees at once whatever step may still write."""

    def free(self, pages: Sequence[int], last_step: int) -> None:
        super().free(pages, self.completed_step)


def overwritten_pages(memory: MemoryManager) -> set[int]:
    """A sequence is aborted while a launched step writes its KV, and an adapter is loaded at once."""
    memory.admit("aborted", 4 * PAGE, "", None)
    written_late = set(memory.kv.page_table("aborted"))
    memory.release("aborted", "", last_step=1)
    admitted = memory.admit("newcomer", PAGE, "a", layout_of_pages(3))
    taken = set(memory.kv.page_table("newcomer")) if admitted else set()
    for adapter in memory.adapters:
        taken |= set(adapter.pages)
    return written_late & taken


@pytest.fixture
def memory() -> MemoryManager:
    return MemoryManager(SMALL_PAGES, NUM_PAGES)


def test_no_page_of_a_launched_step_is_handed_out(memory: MemoryManager) -> None:
    assert overwritten_pages(memory) == set()


def test_without_the_quarantine_a_launched_step_overwrites_an_adapter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gpu_worker.memory.manager.PageAllocator", Careless)
    assert overwritten_pages(MemoryManager(SMALL_PAGES, NUM_PAGES)) != set()


def test_the_newcomer_is_admitted_when_the_step_has_completed(memory: MemoryManager) -> None:
    overwritten_pages(memory)
    memory.complete(1)
    assert memory.admit("newcomer", PAGE, "a", layout_of_pages(3))
