"""What fits beside what: sequences, adapters within their share, and pages at the peak."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.core.model import Capacity, Request, Residency, Tier
from scheduler.core.room import Room
from tests.scheduler.core_fakes import make_request

# Pages of 100 bytes and four tokens; an adapter of `make_request` takes one.
CAPACITY = Capacity(num_pages=16, page_bytes=100, page_size=4, max_sequences=4)


def empty(share: float = 0.25, residents: dict[str, Residency] | None = None) -> Room:
    return Room(CAPACITY, {} if residents is None else residents, share)


def holding(*requests: Request, **options: Any) -> Room:
    room = empty(**options)
    for request in requests:
        room.enter(request, 0.0)
    return room


def long(name: str, adapter: str = "", prompt: int = 4, max_tokens: int = 24) -> Request:
    """Seven pages at its end, without its adapter."""
    return make_request(name, adapter, prompt=prompt, max_tokens=max_tokens)


def test_what_reaches_its_full_context_beside_the_others_fits() -> None:
    assert holding(long("a")).fits(long("b"))


def test_what_needs_more_pages_at_the_peak_than_there_are_does_not_fit() -> None:
    assert not holding(long("a"), long("b")).fits(long("c"))


def test_what_ends_before_the_others_grow_fits_though_not_all_can_be_full_at_once() -> None:
    room = holding(long("a"), long("b"))
    short = long("c", prompt=12, max_tokens=4)
    assert room.full_pages(short) > CAPACITY.num_pages - 14
    assert room.fits(short)


def test_more_sequences_than_the_worker_has_do_not_fit() -> None:
    room = holding(*(make_request(name, prompt=1, max_tokens=1) for name in "abcd"))
    assert room.num_sequences == 4
    assert not room.fits(make_request("e", prompt=1, max_tokens=1))


def test_room_is_made_again_by_whoever_leaves() -> None:
    """Not enough for all to be full at once, so that what was found out before must be forgotten."""
    leaving, short = long("b"), long("s", prompt=8, max_tokens=4)
    room = holding(long("a"), leaving, short)
    assert not room.fits(long("c"))
    room.leave(leaving)
    assert room.full_pages(long("a")) + room.full_pages(short) + room.full_pages(long("c")) > CAPACITY.num_pages
    assert room.fits(long("c"))


def test_who_is_away_counts_no_more_and_room_is_as_before() -> None:
    first = long("a")
    room = holding(first, long("b"))
    assert room.fits_without(long("c"), {first.key})
    assert not room.fits_without(long("c"), set())
    assert not room.fits(long("c"))


def test_adapters_have_their_share_and_one_in_use_takes_no_more_of_it() -> None:
    room = holding(*(make_request(name, name, prompt=1, max_tokens=1) for name in "ab"), share=0.125)
    assert room.excess_adapter_pages(make_request("x", "c")) == 1
    assert not room.fits_adapter(make_request("x", "c"))
    assert not room.fits(make_request("x", "c", prompt=1, max_tokens=1))
    assert room.fits(make_request("x", "a", prompt=1, max_tokens=1))
    assert room.fits_adapter(make_request("x", "a"))
    assert room.fits_adapter(make_request("x"))


def test_the_first_adapter_fits_however_large_it_is() -> None:
    assert empty(share=0.01).fits_adapter(make_request("x", "a"))


@pytest.mark.parametrize(("adapter_bytes", "pages"), [(0, 3), (100, 1)])
def test_the_worker_says_how_large_an_adapter_is_when_the_request_does_not(adapter_bytes: int, pages: int) -> None:
    residents = {"a": Residency("a", Tier.PAGES, 3)}
    assert empty(residents=residents).adapter_pages(make_request("x", "a", adapter_bytes=adapter_bytes)) == pages


def test_what_exceeds_an_empty_worker_could_never_fit() -> None:
    fits, too_long = long("a", "a", max_tokens=56), long("b", "a", max_tokens=57)
    assert empty().could_ever_fit(fits)
    assert not empty().could_ever_fit(too_long)


REQUESTS = st.builds(
    lambda adapter, prompt, max_tokens: (adapter, prompt, max_tokens),
    st.sampled_from(["", "a", "b", "c"]),
    st.integers(1, 12),
    st.integers(1, 24),
)


@given(st.lists(st.tuples(REQUESTS, st.sampled_from(["enter", "leave", "grow", "ask"])), max_size=30), REQUESTS)
def test_what_fits_depends_on_who_is_present_and_not_on_how_it_came_to_that(
    history: list[tuple[tuple[str, int, int], str]], asked: tuple[str, int, int]
) -> None:
    room, present = empty(share=0.5), list[Request]()
    for number, ((adapter, prompt, max_tokens), event) in enumerate(history):
        request = make_request(f"r{number}", adapter, prompt=prompt, max_tokens=max_tokens)
        if event == "ask":
            room.fits(request)
        elif event == "enter":
            present.append(request)
            room.enter(request, 0.0)
        elif present and event == "leave":
            room.leave(present.pop(prompt % len(present)))
        elif present:
            grown = present[prompt % len(present)]
            held_pages = room.held_pages(grown)
            grown.generated_tokens += grown.generated_tokens < grown.max_tokens
            room.moved(grown, held_pages)
    newcomer = make_request("new", asked[0], prompt=asked[1], max_tokens=asked[2])
    again = holding(*present, share=0.5)
    assert room.num_sequences == again.num_sequences
    assert room.peak_pages_with(newcomer) == again.peak_pages_with(newcomer)
    assert room.fits(newcomer) == again.fits(newcomer)
