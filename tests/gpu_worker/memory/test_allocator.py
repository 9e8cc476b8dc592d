"""The free list: all or nothing, quarantine until a step completed, books that notice when they are wrong."""

import pytest

from gpu_worker.memory.allocator import IntegrityError, OutOfPagesError, PageAllocator, PageCounts, PageKind

NUM_PAGES = 8


@pytest.fixture
def allocator() -> PageAllocator:
    return PageAllocator(NUM_PAGES)


def test_pages_are_handed_out_once(allocator: PageAllocator) -> None:
    pages = allocator.allocate(5, PageKind.KV) + allocator.allocate(3, PageKind.LOADING)
    assert sorted(pages) == list(range(NUM_PAGES))


def test_every_page_can_be_taken(allocator: PageAllocator) -> None:
    allocator.allocate(NUM_PAGES, PageKind.KV)
    assert allocator.num_free == 0


def test_a_request_for_more_than_is_free_says_both_numbers(allocator: PageAllocator) -> None:
    allocator.allocate(3, PageKind.KV)
    with pytest.raises(OutOfPagesError, match="6 pages asked for, 5 free"):
        allocator.allocate(6, PageKind.KV)


def test_a_request_for_more_than_is_free_takes_nothing(allocator: PageAllocator) -> None:
    before = allocator.counts()
    with pytest.raises(OutOfPagesError):
        allocator.allocate(NUM_PAGES + 1, PageKind.KV)
    assert allocator.counts() == before


def test_no_page_is_a_request_too(allocator: PageAllocator) -> None:
    assert allocator.allocate(0, PageKind.KV) == []


def test_a_page_of_a_completed_step_is_free_at_once(allocator: PageAllocator) -> None:
    allocator.complete(4)
    allocator.free(allocator.allocate(2, PageKind.KV), last_step=4)
    assert allocator.num_free == NUM_PAGES


def test_a_page_that_a_launched_step_may_touch_is_not_free(allocator: PageAllocator) -> None:
    allocator.free(allocator.allocate(2, PageKind.KV), last_step=1)
    assert (allocator.num_free, allocator.counts().quarantined) == (NUM_PAGES - 2, 2)


def test_an_earlier_step_does_not_end_the_quarantine(allocator: PageAllocator) -> None:
    allocator.free(allocator.allocate(2, PageKind.KV), last_step=3)
    allocator.complete(2)
    assert allocator.num_free == NUM_PAGES - 2


def test_the_quarantine_ends_with_its_step(allocator: PageAllocator) -> None:
    allocator.free(allocator.allocate(2, PageKind.KV), last_step=3)
    allocator.complete(3)
    assert (allocator.num_free, allocator.counts().quarantined) == (NUM_PAGES, 0)


def test_a_completed_step_completes_those_before_it(allocator: PageAllocator) -> None:
    for step in (1, 2, 3):
        allocator.free(allocator.allocate(1, PageKind.KV), last_step=step)
    allocator.complete(2)
    assert allocator.counts().quarantined == 1


def test_an_old_page_behind_a_new_one_in_quarantine_is_freed_in_time(allocator: PageAllocator) -> None:
    allocator.free(allocator.allocate(1, PageKind.KV), last_step=5)
    old = allocator.allocate(1, PageKind.ADAPTER)
    allocator.free(old, last_step=1)
    allocator.complete(1)
    assert allocator.allocate(1, PageKind.KV) == old


def test_the_page_freed_last_is_given_out_first(allocator: PageAllocator) -> None:
    first, second = allocator.allocate(1, PageKind.KV), allocator.allocate(1, PageKind.KV)
    allocator.free(first, last_step=0)
    allocator.free(second, last_step=0)
    assert allocator.allocate(1, PageKind.KV) == second


def test_a_relabelled_page_counts_as_what_it_holds_now(allocator: PageAllocator) -> None:
    pages = allocator.allocate(3, PageKind.LOADING)
    allocator.relabel(pages[:2], PageKind.ADAPTER)
    counts = PageCounts(total=8, free=5, quarantined=0, loading=1, kv=0, prefix=0, adapters=2)
    assert allocator.counts() == counts


def test_every_kind_is_counted(allocator: PageAllocator) -> None:
    for kind, num_pages in ((PageKind.KV, 1), (PageKind.PREFIX, 2), (PageKind.ADAPTER, 1), (PageKind.LOADING, 1)):
        allocator.allocate(num_pages, kind)
    allocator.free(allocator.allocate(2, PageKind.KV), last_step=9)
    counts = PageCounts(total=8, free=1, quarantined=2, loading=1, kv=1, prefix=2, adapters=1)
    assert allocator.counts() == counts


class TestIntegrity:
    """The books are broken by hand; the check must see it."""

    def test_balanced_books_pass(self, allocator: PageAllocator) -> None:
        pages = allocator.allocate(3, PageKind.KV)
        allocator.free(pages[2:], last_step=1)
        allocator.check_integrity([(PageKind.KV, pages[:2])])

    def test_a_page_with_two_owners(self, allocator: PageAllocator) -> None:
        pages = allocator.allocate(2, PageKind.KV)
        with pytest.raises(IntegrityError, match=rf"page {pages[0]} \(KV\) has 2 owners"):
            allocator.check_integrity([(PageKind.KV, pages), (PageKind.KV, pages[:1])])

    def test_a_page_without_owner(self, allocator: PageAllocator) -> None:
        pages = allocator.allocate(2, PageKind.KV)
        with pytest.raises(IntegrityError, match=rf"page {pages[1]} \(KV\) has 0 owners"):
            allocator.check_integrity([(PageKind.KV, pages[:1])])

    def test_a_page_of_another_kind_than_its_owner_says(self, allocator: PageAllocator) -> None:
        pages = allocator.allocate(1, PageKind.LOADING)
        with pytest.raises(IntegrityError, match="LOADING, its owner says ADAPTER"):
            allocator.check_integrity([(PageKind.ADAPTER, pages)])

    def test_a_page_freed_twice(self, allocator: PageAllocator) -> None:
        pages = allocator.allocate(1, PageKind.KV)
        allocator.free(pages, last_step=0)
        allocator.free(pages, last_step=0)
        with pytest.raises(IntegrityError, match="has 2 owners"):
            allocator.check_integrity([])

    def test_a_freed_page_that_its_owner_still_holds(self, allocator: PageAllocator) -> None:
        pages = allocator.allocate(1, PageKind.KV)
        allocator.free(pages, last_step=0)
        with pytest.raises(IntegrityError, match="FREE, its owner says KV"):
            allocator.check_integrity([(PageKind.KV, pages)])

    def test_a_lost_page_of_the_free_list(self, allocator: PageAllocator) -> None:
        allocator._free.pop()
        with pytest.raises(IntegrityError, match="has 0 owners"):
            allocator.check_integrity([])

    def test_a_wrong_tally(self, allocator: PageAllocator) -> None:
        allocator._tally[PageKind.KV] += 1
        with pytest.raises(IntegrityError, match="1 pages tallied as KV, 0 are"):
            allocator.check_integrity([])
