"""The one line of those who may have to go."""

import pytest

from gpu_worker.memory.eviction import Candidate, EvictionPolicy, EvictionQueue, LeastRecentlyUsed, LeastWorth


class Thing(Candidate):
    """Takes `size` pages."""

    def __init__(self, name: str, worth: float = 1.0, size: int = 1) -> None:
        super().__init__()
        self.name = name
        self.size = size
        self.now_worth = worth
        self.leaf = True

    @property
    def num_pages(self) -> int:
        return self.size

    @property
    def worth(self) -> float:
        return self.now_worth

    @property
    def exposed(self) -> bool:
        return self.leaf


def leave(queue: EvictionQueue, name: str, worth: float = 1.0) -> Thing:
    thing = Thing(name, worth)
    queue.add(thing)
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
    return EvictionQueue(LeastWorth())


def test_what_is_worth_less_goes_first(queue: EvictionQueue) -> None:
    for name, worth in (("a", 2.0), ("b", 1.0), ("c", 3.0)):
        leave(queue, name, worth)
    assert order(queue) == "bac"


def test_equals_go_in_the_order_they_came(queue: EvictionQueue) -> None:
    for name in "abc":
        leave(queue, name)
    assert order(queue) == "abc"


def test_what_is_worth_more_than_when_it_came_keeps_its_pages(queue: EvictionQueue) -> None:
    things = [leave(queue, name, worth) for name, worth in (("a", 1.0), ("b", 2.0), ("c", 4.0))]
    things[0].now_worth = 3.0
    assert (queue.evictable_pages, order(queue)) == (3, "bac")


def test_what_is_worth_less_than_when_it_came_goes_earlier_when_that_is_told(queue: EvictionQueue) -> None:
    things = [leave(queue, name, worth) for name, worth in (("a", 1.0), ("b", 2.0))]
    things[1].now_worth = 0.0
    queue.look_again(things[1])
    assert (queue.evictable_pages, order(queue)) == (2, "ba")


def test_whoever_is_in_use_is_not_put_in_line_by_a_second_look(queue: EvictionQueue) -> None:
    thing = leave(queue, "a")
    queue.discard(thing)
    queue.look_again(thing)
    queue.check_integrity([thing])
    assert queue.evictable_pages == 0


def test_the_baseline_looks_at_the_time_only() -> None:
    queue = EvictionQueue(LeastRecentlyUsed())
    things = [leave(queue, name, worth) for name, worth in (("a", 9.0), ("b", 1.0), ("c", 3.0))]
    things[0].now_worth = 99.0
    queue.look_again(things[0])
    assert order(queue) == "abc"


def test_what_is_used_again_is_not_taken(queue: EvictionQueue) -> None:
    things = [leave(queue, name) for name in "abc"]
    queue.discard(things[1])
    assert (queue.evictable_pages, order(queue)) == (2, "ac")


def test_what_is_set_aside_gets_its_place_back(queue: EvictionQueue) -> None:
    first = leave(queue, "a", 1.0)
    leave(queue, "b", 2.0)
    queue.discard(first)
    queue.restore(first)
    assert (queue.evictable_pages, order(queue)) == (2, "ab")


def test_what_comes_back_has_a_new_place(queue: EvictionQueue) -> None:
    first = leave(queue, "a", 1.0)
    leave(queue, "b", 2.0)
    queue.discard(first)
    first.now_worth = 3.0
    queue.add(first)
    assert order(queue) == "ba"


def test_nothing_is_taken_before_its_last_step_is_over(queue: EvictionQueue) -> None:
    thing = Thing("a", size=3)
    thing.last_step = 2
    queue.add(thing)
    seen = [queue.evictable_pages]
    for step in (1, 2):
        queue.complete(step)
        seen.append(queue.evictable_pages)
    assert seen == [0, 0, 3]


def test_a_later_step_keeps_it_longer(queue: EvictionQueue) -> None:
    thing = Thing("a")
    for step in (1, 2):
        thing.last_step = step
        queue.add(thing)
        queue.discard(thing)
    thing.last_step = 3
    queue.add(thing)
    queue.complete(2)
    before = queue.evictable_pages
    queue.complete(3)
    assert (before, queue.evictable_pages, order(queue)) == (0, 1, "a")


def test_what_others_depend_on_counts_but_waits_for_them(queue: EvictionQueue) -> None:
    parent = Thing("p", worth=0.0)
    parent.leaf = False
    queue.add(parent)
    leave(queue, "c", 9.0)
    assert queue.evictable_pages == 2
    child = queue.pop()
    parent.leaf = True
    queue.expose(parent)
    assert (child is not parent, queue.pop() is parent) == (True, True)


@pytest.mark.parametrize("policy", [LeastWorth(), LeastRecentlyUsed()], ids=["worth", "lru"])
def test_void_entries_do_not_pile_up(policy: EvictionPolicy) -> None:
    queue = EvictionQueue(policy)
    things = [leave(queue, name) for name in "ab"]
    for _ in range(1000):
        queue.discard(things[0])
        queue.add(things[0])
    assert len(queue._heap) < 100
    assert sorted(order(queue)) == ["a", "b"]
