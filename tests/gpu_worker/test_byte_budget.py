"""A budget of bytes: what is held stays, what is worth least goes first, and the totals are running ones."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_worker.byte_budget import ByteBudget


@pytest.fixture
def budget() -> ByteBudget[str]:
    budget: ByteBudget[str] = ByteBudget(100)
    for name in ("a", "b", "c"):
        budget.add(name, 30, seconds=1.0)
    return budget


def test_nothing_goes_while_there_is_room(budget: ByteBudget[str]) -> None:
    assert budget.make_room(10) == []


def test_the_oldest_of_equals_goes_first(budget: ByteBudget[str]) -> None:
    assert budget.make_room(40) == ["a"]


def test_what_is_used_again_stays_longer(budget: ByteBudget[str]) -> None:
    budget.use("a")
    assert budget.make_room(40) == ["b"]


def test_what_is_dear_to_bring_back_stays_longer() -> None:
    budget: ByteBudget[str] = ByteBudget(100)
    budget.add("dear", 50, seconds=10.0)
    budget.add("cheap", 50, seconds=1.0)
    assert budget.make_room(1) == ["cheap"]


def test_what_takes_much_room_for_its_worth_goes_first() -> None:
    budget: ByteBudget[str] = ByteBudget(100)
    budget.add("small", 10, seconds=1.0)
    budget.add("large", 90, seconds=1.0)
    assert budget.make_room(5) == ["large"]


def test_what_was_dear_once_grows_old() -> None:
    budget: ByteBudget[str] = ByteBudget(100)
    budget.add("once", 50, seconds=3.0)
    for number in range(20):
        name = f"new-{number}"
        if "once" in (budget.make_room(50) or ()):
            return
        budget.add(name, 50, seconds=1.0)
    raise AssertionError("it stayed for ever")


def test_a_held_one_stays(budget: ByteBudget[str]) -> None:
    budget.hold("a")
    assert budget.make_room(40) == ["b"]


def test_a_released_one_goes_again(budget: ByteBudget[str]) -> None:
    budget.hold("a")
    budget.make_room(40)
    budget.release("a")
    assert budget.make_room(100) == ["c", "a"]


def test_when_too_much_is_held_nothing_goes(budget: ByteBudget[str]) -> None:
    budget.hold("a")
    assert budget.make_room(71) is None
    assert budget.used_bytes == 90


def test_shrinking_takes_what_it_can(budget: ByteBudget[str]) -> None:
    budget.hold("b")
    assert budget.shrink(1000) == ["a", "c"]


_Operation = tuple[str, int]


@given(st.lists(st.tuples(st.sampled_from(["add", "use", "hold", "release", "remove", "room"]), st.integers(0, 9))))
def test_the_totals_are_those_of_the_entries(operations: list[_Operation]) -> None:
    budget: ByteBudget[int] = ByteBudget(40)
    sizes: dict[int, int] = {}
    holds: dict[int, int] = {}
    for name, key in operations:
        if name == "add" and key not in sizes:
            victims = budget.make_room(key)
            assert (victims is None) == (sum(sizes[held] for held in holds if holds[held]) + key > 40)
            if victims is not None:
                assert not any(holds.get(victim) for victim in victims)
                for victim in victims:
                    del sizes[victim]
                budget.add(key, key, seconds=1.0)
                sizes[key] = key
        elif key in sizes:
            if name == "use":
                budget.use(key)
            elif name == "hold":
                budget.hold(key)
                holds[key] = holds.get(key, 0) + 1
            elif name == "release" and holds.get(key):
                budget.release(key)
                holds[key] -= 1
            elif name == "remove":
                budget.remove(key)
                del sizes[key]
                holds.pop(key, None)
        assert budget.used_bytes == sum(sizes.values()) <= 40
        assert set(budget) == sizes.keys()
