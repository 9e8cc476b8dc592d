"""The one line of those who may have to go."""

import pytest

from gpu_worker.memory.eviction import (
    HALF_LIFE_REQUESTS,
    Candidate,
    EvictionPolicy,
    EvictionQueue,
    GreedyDual,
    LeastRecentlyUsed,
)


class Thing(Candidate):
    """Takes `size` pages."""

    def __init__(self, name: str, size: int = 1) -> None:
        super().__init__()
        self.name = name
        self.size = size
        self.leaf = True

    @property
    def num_pages(self) -> int:
        return self.size

    @property
    def exposed(self) -> bool:
        return self.leaf


def leave(queue: EvictionQueue, name: str, seconds: float = 1.0, size: int = 1, uses: int = 1) -> Thing:
    thing = Thing(name, size)
    for _ in range(uses):
        queue.tick()
        queue.wanted(thing)
    queue.add(thing, seconds)
    return thing


def order(queue: EvictionQueue) -> str:
    names = ""
    while queue.evictable_pages:
        thing = queue.pop()
        assert isinstance(thing, Thing)
        names += thing.name
    return names


@pytest.fixture
def queue() -> EvictionQueue:
    return EvictionQueue(GreedyDual())


@pytest.mark.parametrize(
    "options",
    [({"seconds": 2.0}, {"seconds": 1.0}), ({"size": 2}, {"size": 3}), ({"uses": 3}, {"uses": 2})],
    ids=["seconds", "pages", "demand"],
)
def test_what_is_worth_less_per_page_goes_first(queue: EvictionQueue, options: tuple[dict[str, float], ...]) -> None:
    for name, option in zip("ab", options, strict=True):
        leave(queue, name, **option)  # type: ignore[arg-type]  # sizes and uses are whole
    assert order(queue) == "ba"


def test_equals_go_in_the_order_they_came(queue: EvictionQueue) -> None:
    for name in "abc":
        leave(queue, name)
    assert order(queue) == "abc"


def test_what_nobody_wants_any_more_goes_in_the_end(queue: EvictionQueue) -> None:
    leave(queue, "o", seconds=5.0)
    turns = 0
    while True:
        leave(queue, "n", seconds=1.0)
        turns += 1
        victim = queue.pop()
        assert isinstance(victim, Thing)
        if victim.name == "o":
            break
    assert turns in (5, 6)


def test_a_demand_of_long_ago_counts_half(queue: EvictionQueue) -> None:
    thing = Thing("a")
    queue.wanted(thing)
    for _ in range(HALF_LIFE_REQUESTS):
        queue.tick()
    queue.wanted(thing)
    assert thing.demand == pytest.approx(1.5)


def test_the_baseline_looks_at_the_time_only() -> None:
    queue = EvictionQueue(LeastRecentlyUsed())
    for name, seconds, uses in (("a", 9.0, 5), ("b", 1.0, 1), ("c", 3.0, 2)):
        leave(queue, name, seconds, uses=uses)
    assert order(queue) == "abc"


def test_what_is_used_again_is_not_taken(queue: EvictionQueue) -> None:
    things = [leave(queue, name) for name in "abc"]
    queue.discard(things[1])
    assert (queue.evictable_pages, order(queue)) == (2, "ac")


def test_what_is_set_aside_gets_its_place_back(queue: EvictionQueue) -> None:
    first = leave(queue, "a", seconds=1.0)
    leave(queue, "b", seconds=2.0)
    queue.discard(first)
    queue.restore(first)
    assert (queue.evictable_pages, order(queue)) == (2, "ab")


def test_what_comes_back_has_a_new_place(queue: EvictionQueue) -> None:
    first = leave(queue, "a")
    leave(queue, "b")
    queue.discard(first)
    queue.add(first, 1.5)
    assert order(queue) == "ba"


def test_nothing_is_taken_before_its_last_step_is_over(queue: EvictionQueue) -> None:
    thing = Thing("a", 3)
    thing.last_step = 2
    queue.add(thing, 1.0)
    seen = [queue.evictable_pages]
    for step in (1, 2):
        queue.complete(step)
        seen.append(queue.evictable_pages)
    assert seen == [0, 0, 3]


def test_a_later_step_keeps_it_longer(queue: EvictionQueue) -> None:
    thing = Thing("a")
    for step in (1, 2):
        thing.last_step = step
        queue.add(thing, 1.0)
        queue.discard(thing)
    thing.last_step = 3
    queue.add(thing, 1.0)
    queue.complete(2)
    before = queue.evictable_pages
    queue.complete(3)
    assert (before, queue.evictable_pages, order(queue)) == (0, 1, "a")


def test_what_others_depend_on_counts_but_waits_for_them(queue: EvictionQueue) -> None:
    parent = Thing("p")
    parent.leaf = False
    queue.add(parent, 0.0)
    leave(queue, "c", seconds=9.0)
    assert queue.evictable_pages == 2
    child = queue.pop()
    parent.leaf = True
    queue.expose(parent)
    assert (child is not parent, queue.pop() is parent) == (True, True)


@pytest.mark.parametrize("policy", [GreedyDual(), LeastRecentlyUsed()], ids=["greedy-dual", "lru"])
def test_void_entries_do_not_pile_up(policy: EvictionPolicy) -> None:
    queue = EvictionQueue(policy)
    things = [leave(queue, name) for name in "ab"]
    for _ in range(1000):
        queue.discard(things[0])
        queue.add(things[0], 1.0)
    assert len(queue._heap) < 100
    assert sorted(order(queue)) == ["a", "b"]


@pytest.mark.parametrize(("seconds", "expected"), [(0.5, "ab"), (1.5, "ba")])
def test_what_is_put_back_for_a_dearer_return_has_a_place_of_its_own(
    queue: EvictionQueue, seconds: float, expected: str
) -> None:
    leave(queue, "a", seconds=1.0)
    leave(queue, "b", seconds=2.0)
    queue.defer(queue.pop(), seconds)
    assert queue.evictable_pages == 2
    assert order(queue) == expected


def test_the_baseline_does_not_ask_what_a_return_costs() -> None:
    queue = EvictionQueue(LeastRecentlyUsed())
    for name in "ab":
        leave(queue, name)
    queue.defer(queue.pop(), 9.0)
    assert order(queue) == "ab"
