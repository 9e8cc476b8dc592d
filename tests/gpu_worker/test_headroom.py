"""Who would soon want the pages that a newcomer takes."""

import pytest

from gpu_worker.headroom import Headroom
from gpu_worker.sequence import Sequence
from tests.gpu_worker.support import SMALL_PAGES, waiting_sequence

PAGE = SMALL_PAGES.page_size


def running(num_tokens: int, *, max_tokens: int, drawn: int = 0) -> Sequence:
    sequence = waiting_sequence("s", num_tokens - drawn, max_tokens=max_tokens)
    sequence.output_token_ids.extend([0] * drawn)
    return sequence


def taught(share: float) -> Headroom:
    headroom = Headroom(PAGE)
    for _ in range(100):
        headroom.ended(running(20, max_tokens=100, drawn=round(100 * share)) if share else running(20, max_tokens=100))
    return headroom


def test_nothing_is_expected_before_anybody_ended() -> None:
    pair = [running(PAGE, max_tokens=1000) for _ in range(2)]
    assert Headroom(PAGE).suffices(pair, 2)


@pytest.mark.parametrize(("num_pages", "suffices"), [(12, True), (11, False)])
def test_equals_need_room_for_all_that_is_to_come(num_pages: int, suffices: bool) -> None:
    pair = [running(2 * PAGE, max_tokens=4 * PAGE) for _ in range(2)]
    headroom = Headroom(PAGE)
    for _ in range(200):
        headroom.ended(running(8, max_tokens=4, drawn=4))
    assert headroom.suffices(pair, num_pages) is suffices


@pytest.mark.parametrize(("num_pages", "suffices"), [(11, True), (10, False)])
def test_who_ends_early_leaves_its_pages_to_the_others(num_pages: int, suffices: bool) -> None:
    """One holds 2 pages and will have 10 more; the other holds 5 and ends a page later: 2 + 1 and 5 + 1, then 12."""
    headroom = Headroom(PAGE)
    for _ in range(200):
        headroom.ended(running(8, max_tokens=4, drawn=4))
    early, late = running(5 * PAGE, max_tokens=PAGE), running(2 * PAGE, max_tokens=9 * PAGE)
    assert headroom.suffices([early, late], num_pages) is suffices


def test_half_of_what_was_asked_for_is_expected_when_half_is_used() -> None:
    one = [running(PAGE, max_tokens=10 * PAGE)]
    assert [taught(0.5).suffices(one, num_pages) for num_pages in (5, 6)] == [False, True]


def test_a_preemption_teaches_to_expect_more() -> None:
    one, headroom = [running(PAGE, max_tokens=10 * PAGE)], Headroom(PAGE)
    before = headroom.suffices(one, 2)
    for _ in range(5):
        headroom.preempted()
    assert (before, headroom.suffices(one, 2)) == (True, False)
