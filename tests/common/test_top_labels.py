"""Names become label values, never more than allowed, and the busiest keep their own."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from common.top_labels import OTHER, FoldedCounters, TopLabels, overflow_counter


def test_names_that_fit_are_themselves() -> None:
    top = TopLabels(2)
    assert [top.fold(name) for name in ("a", "b", "a")] == ["a", "b", "a"]


def test_a_name_too_many_is_other() -> None:
    top = TopLabels(2)
    assert [top.fold(name) for name in ("a", "b", "c")] == ["a", "b", OTHER]
    assert top.names == ["a", "b"]


def test_a_busy_newcomer_takes_the_place_of_the_idlest() -> None:
    left: list[str] = []
    top = TopLabels(2, left.append)
    for name in ("a", "a", "a", "a", "b"):
        top.fold(name)
    assert [top.fold("c") for _ in range(3)] == [OTHER, OTHER, "c"]
    assert left == ["b"]


def test_two_equally_busy_names_do_not_alternate() -> None:
    left: list[str] = []
    top = TopLabels(1, left.append)
    for _ in range(200):
        top.fold("a")
        top.fold("b")
    assert left == []


def test_yesterdays_traffic_fades() -> None:
    top = TopLabels(1)
    for _ in range(10_000):
        top.fold("old")
    assert "new" in [top.fold("new") for _ in range(1_000)]


@given(st.lists(st.integers(0, 30), max_size=400), st.integers(1, 5))
def test_held_names_never_exceed_the_limit(names: list[int], limit: int) -> None:
    held: set[str] = set()
    top = TopLabels(limit, held.remove)
    for name in map(str, names):
        folded = top.fold(name)
        assert folded in (name, OTHER)
        if folded != OTHER:
            held.add(folded)
        assert len(held) <= limit


@pytest.mark.parametrize("names", [5_000])
def test_counters_stay_bounded_and_lose_no_event_to_nobody(names: int) -> None:
    registry = CollectorRegistry()
    counters = FoldedCounters("adapter", 50, registry, overflow_counter(registry))
    counter = counters.add("requests_total", "", ("outcome",))
    expected: Counter[str] = Counter()
    for index in range(names):
        folded = counters.fold(f"adapter-{index}")
        counter.labels(folded, "ok").inc()
        expected[folded] += 1
    shown = [line for line in generate_latest(registry).decode().splitlines() if line.startswith("requests_total")]
    assert len(shown) == 51
    assert registry.get_sample_value("requests_total", {"adapter": OTHER, "outcome": "ok"}) == expected[OTHER]
    overflow = registry.get_sample_value("loraplex_label_overflow_total", {"label": "adapter"})
    assert overflow == expected[OTHER] == names - 50


def test_a_name_that_leaves_takes_its_series_along() -> None:
    registry = CollectorRegistry()
    counters = FoldedCounters("adapter", 1, registry, overflow_counter(registry))
    counter = counters.add("requests_total", "", ("outcome",))
    for name in ("old", "new", "new", "new"):
        counter.labels(counters.fold(name), "ok").inc()
    assert registry.get_sample_value("requests_total", {"adapter": "old", "outcome": "ok"}) is None
    assert registry.get_sample_value("requests_total", {"adapter": "new", "outcome": "ok"}) == 1
