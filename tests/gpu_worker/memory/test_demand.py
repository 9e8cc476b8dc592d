"""Who is asked for how often, and what an age says of a page."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_worker.memory import demand
from gpu_worker.memory.demand import (
    AGE_CLASSES,
    HALF_LIFE_REQUESTS,
    Demand,
    ReturnChances,
    next_class_at,
    worth,
)


@pytest.fixture
def book() -> Demand:
    return Demand()


def test_an_adapter_asked_for_more_often_is_wanted_more(book: Demand) -> None:
    for name in "aab":
        book.admitted(name)
    assert book.of("a").level > book.of("b").level > book.of("c").level == -float("inf")


def test_a_demand_of_long_ago_counts_half(book: Demand) -> None:
    book.admitted("a")
    for _ in range(HALF_LIFE_REQUESTS):
        book.admitted("b")
    assert book.of("a").demand(HALF_LIFE_REQUESTS + 1) == pytest.approx(0.5)


def test_levels_compare_as_demands_do_at_any_time(book: Demand) -> None:
    """Twice as often, but a half-life ago: a little less than what is asked for now."""
    for _ in range(2):
        book.admitted("old")
    for _ in range(HALF_LIFE_REQUESTS):
        book.admitted("other")
    book.admitted("new")
    assert book.of("new").level > book.of("old").level > book.of("new").level - 0.01


def test_a_request_that_was_foreseen_counts_once(book: Demand) -> None:
    book.foresee("a")
    seen = [round(book.of("a").demand(0), 2)]
    for clock in (1, 2):
        book.admitted("a")
        seen.append(round(book.of("a").demand(clock), 2))
    assert seen == [1.0, 1.0, 2.0]


def test_a_request_that_was_foreseen_and_comes_too_late_counts_once(book: Demand) -> None:
    book.foresee("a")
    book.of("a").withdraw()
    before = book.of("a").demand(0)
    book.admitted("a")
    assert (before, book.of("a").demand(1)) == (0.0, 1.0)


def test_only_admissions_make_pages_older(book: Demand) -> None:
    book.foresee("a")
    before = book.of("a").admitted
    book.admitted("a")
    assert (before, book.of("a").admitted) == (0, 1)


def test_who_was_asked_for_longest_ago_is_forgotten_first(book: Demand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demand, "MAX_KNOWN_ADAPTERS", 2)
    for name in "abac":
        book.admitted(name)
    assert [book.of(name).admitted for name in "ab"] == [2, 0]


@pytest.mark.parametrize("seconds", [1e-9, 1.0, 3600.0])
def test_worth_grows_with_both(seconds: float) -> None:
    assert worth(1.0, seconds) < min(worth(2.0, seconds), worth(1.0, 2 * seconds))
    assert worth(1.0, 0.0) == -float("inf")


def test_chances_follow_what_was_seen() -> None:
    """Three of four pages are wanted by the very next request, none later."""
    chances = ReturnChances()
    for number in range(4000):
        chances.ended(0 if number % 4 else 6, returned=bool(number % 4))
    assert chances.of(0) == pytest.approx(0.75, abs=0.01)
    assert max(chances.of(1), chances.of(2), chances.of(3), chances.of(6)) < 0.01


def test_a_chance_is_one_of_each_request() -> None:
    """Every page is wanted by the sixth request: ages 3 to 5 took three requests of which one wanted it."""
    chances = ReturnChances()
    for _ in range(4000):
        chances.ended(5, returned=True)
    assert chances.of(3) == chances.of(6) == pytest.approx(1 / 3, abs=0.01)


def test_chances_change_with_the_times() -> None:
    chances, seen = ReturnChances(), []
    for age, returned in ((1, False), (0, True)):
        for _ in range(300_000):
            chances.ended(age, returned=returned)
        seen.append(chances.of(0))
    assert seen[0] < 0.01 < 0.9 < seen[1]


@given(ages=st.lists(st.tuples(st.integers(0, 5000), st.booleans()), max_size=50), age=st.integers(0, 5000))
def test_a_chance_is_between_none_and_certain(ages: list[tuple[int, bool]], age: int) -> None:
    chances = ReturnChances()
    for ended, returned in ages:
        chances.ended(ended, returned=returned)
    assert 0 < chances.of(age) <= 1


@given(age=st.integers(0, 2**AGE_CLASSES + 10))
def test_the_next_class_is_where_another_chance_begins(age: int) -> None:
    """Of a table in which no two classes are alike."""
    chances, later = ReturnChances(), next_class_at(age)
    ages = range(age, later or 2 * 2**AGE_CLASSES)
    assert {chances.of(other) for other in ages} == {chances.of(age)}
    assert not later or chances.of(later) != chances.of(age)
