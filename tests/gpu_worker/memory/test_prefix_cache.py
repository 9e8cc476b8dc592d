"""Pages by what they hold: keys, sharing, twins, and leaves that go first."""

import pytest

from gpu_worker.memory.manager import MemoryManager
from gpu_worker.memory.prefix_cache import PrefixKeys
from tests.gpu_worker.support import SMALL_PAGES, layout_of_pages

NUM_PAGES = 10
PAGE = SMALL_PAGES.page_size


def keys_of(tokens: list[int], adapter: str = "", salt: str = "tenant") -> list[bytes]:
    prefix = PrefixKeys(adapter, salt, PAGE)
    prefix.extend(tokens)
    return prefix.keys


PROMPT = list(range(4 * PAGE))
KEYS = keys_of(PROMPT)


@pytest.fixture
def memory() -> MemoryManager:
    return MemoryManager(SMALL_PAGES, NUM_PAGES)


def compute(memory: MemoryManager, name: str, keys: list[bytes], num_tokens: int = 0) -> None:
    """Admits a sequence that computes whatever `keys` name, and a token more."""
    assert memory.admit(name, num_tokens or len(keys) * PAGE + 1, "", None, keys)
    memory.publish(name, keys)


def leave(memory: MemoryManager, name: str, keys: list[bytes]) -> None:
    compute(memory, name, keys)
    memory.release(name, "", 0)


def test_only_full_pages_have_keys() -> None:
    assert [len(keys_of(PROMPT[:length])) for length in (0, PAGE - 1, PAGE, 2 * PAGE - 1)] == [0, 0, 1, 1]


def test_keys_do_not_depend_on_how_the_tokens_come() -> None:
    prefix = PrefixKeys("", "tenant", PAGE)
    prefix.extend(PROMPT[:PAGE])
    prefix.extend(PROMPT[PAGE : 2 * PAGE + 1])
    prefix.extend(PROMPT[2 * PAGE :])
    assert prefix.keys == KEYS


def test_a_page_of_the_same_tokens_elsewhere_has_another_key() -> None:
    assert len(set(keys_of([7] * 4 * PAGE))) == 4


@pytest.mark.parametrize(
    "other",
    [
        keys_of([99, *PROMPT[1:]]),
        keys_of(PROMPT, adapter="digest"),
        keys_of(PROMPT, salt="another"),
        keys_of(PROMPT, adapter="t", salt="enant"),
    ],
    ids=["first token", "adapter", "salt", "adapter and salt together"],
)
def test_every_key_depends_on_all_that_was_before(other: list[bytes]) -> None:
    assert set(KEYS) & set(other) == set()


def test_a_finished_sequence_leaves_its_full_pages(memory: MemoryManager) -> None:
    leave(memory, "s", KEYS)
    counts = memory.counts()
    assert (counts.prefix, counts.kv, memory.evictable_pages) == (4, 0, 4)


def test_a_later_sequence_begins_with_them(memory: MemoryManager) -> None:
    compute(memory, "s", KEYS)
    pages = list(memory.kv.page_table("s"))[:4]
    memory.release("s", "", 0)
    memory.admit("t", 4 * PAGE + 1, "", None, KEYS)
    assert list(memory.kv.page_table("t"))[:4] == pages


def test_a_hit_is_no_longer_evictable(memory: MemoryManager) -> None:
    leave(memory, "s", KEYS)
    memory.admit("t", 2 * PAGE + 1, "", None, KEYS[:2])
    counts = memory.counts()
    assert (counts.prefix, counts.kv, memory.evictable_pages) == (2, 3, 2)


def test_pages_of_a_running_sequence_are_shared_too(memory: MemoryManager) -> None:
    compute(memory, "s", KEYS)
    memory.admit("t", 4 * PAGE + 1, "", None, KEYS)
    assert memory.counts().kv == 4 + 2


def test_a_shared_page_stays_until_the_last_lets_go(memory: MemoryManager) -> None:
    compute(memory, "s", KEYS)
    memory.admit("t", 4 * PAGE + 1, "", None, KEYS)
    memory.release("s", "", 0)
    held = memory.counts().kv
    memory.release("t", "", 0)
    assert (held, memory.counts().kv, memory.counts().prefix) == (5, 0, 4)


def test_another_ending_shares_what_is_the_same(memory: MemoryManager) -> None:
    leave(memory, "s", KEYS)
    other = keys_of([*PROMPT[: 2 * PAGE], *[77] * 2 * PAGE])
    assert memory.cached_tokens(other) == 2 * PAGE


def test_two_that_compute_the_same_at_once_both_keep_their_pages(memory: MemoryManager) -> None:
    for name in ("s", "t"):
        assert memory.admit(name, 2 * PAGE, "", None)
    pages = {name: list(memory.kv.page_table(name)) for name in ("s", "t")}
    for name in ("s", "t"):
        memory.publish(name, KEYS[:2])
    assert {name: list(memory.kv.page_table(name)) for name in ("s", "t")} == pages
    memory.check_integrity()


@pytest.mark.parametrize("order", ["st", "ts"])
def test_of_twins_one_stays_and_the_other_is_freed(memory: MemoryManager, order: str) -> None:
    for name in ("s", "t"):
        memory.admit(name, 2 * PAGE, "", None)
    for name in ("s", "t"):
        memory.publish(name, KEYS[:2])
    for name in order:
        memory.release(name, "", 0)
        memory.check_integrity()
    assert (memory.counts().prefix, memory.counts().free) == (2, NUM_PAGES - 2)


def test_what_follows_a_twin_is_found(memory: MemoryManager) -> None:
    for name in ("s", "t"):
        memory.admit(name, 4 * PAGE, "", None)
    memory.publish("s", KEYS[:1])
    memory.publish("t", KEYS[:3])
    for name in ("s", "t"):
        memory.release(name, "", 0)
    assert memory.cached_tokens(KEYS) == 3 * PAGE


def test_the_end_of_a_chain_goes_first(memory: MemoryManager) -> None:
    leave(memory, "s", KEYS)
    left = []
    for num_pages in range(7, 11):
        assert memory.admit("large", num_pages * PAGE, "", None)
        left.append(memory.cached_tokens(KEYS) // PAGE)
        memory.release("large", "", 0)
    assert left == [3, 2, 1, 0]


def test_the_common_beginning_outlives_both_ends(memory: MemoryManager) -> None:
    ends = [keys_of([*PROMPT[: 2 * PAGE], *[token] * PAGE]) for token in (70, 80)]
    for keys in ends:
        leave(memory, "s", keys)
    memory.admit("large", 8 * PAGE, "", None)
    assert [memory.cached_tokens(keys) // PAGE for keys in ends] == [2, 2]


def test_a_hit_makes_no_room_for_itself(memory: MemoryManager) -> None:
    leave(memory, "s", KEYS)
    assert not memory.admit("t", (NUM_PAGES + 1) * PAGE, "", None, KEYS)
    assert memory.admit("t", NUM_PAGES * PAGE, "", None, KEYS)
    memory.check_integrity()


def test_a_refused_admission_keeps_the_hits_evictable(memory: MemoryManager) -> None:
    leave(memory, "s", KEYS)
    memory.admit("t", 3 * PAGE, "", None)
    memory.admit("u", NUM_PAGES * PAGE, "", None, KEYS)
    assert (memory.evictable_pages, memory.cached_tokens(KEYS)) == (4, 4 * PAGE)


def test_pages_that_a_launched_step_may_touch_are_not_evictable_yet(memory: MemoryManager) -> None:
    compute(memory, "s", KEYS)
    memory.release("s", "", last_step=1)
    before = memory.evictable_pages
    memory.complete(1)
    assert (before, memory.evictable_pages) == (0, 4)


def test_a_page_that_is_wanted_while_it_cools_is_not_evictable(memory: MemoryManager) -> None:
    compute(memory, "s", KEYS)
    memory.release("s", "", last_step=1)
    compute(memory, "t", KEYS)
    memory.complete(1)
    assert memory.evictable_pages == 0
    memory.check_integrity()


def test_a_preempted_sequences_pages_outlive_a_finished_ones(memory: MemoryManager) -> None:
    finished = keys_of([50] * 4 * PAGE)
    compute(memory, "preempted", KEYS)
    compute(memory, "finished", finished)
    memory.release("preempted", "", 0, returning=True)
    memory.release("finished", "", 0)
    memory.admit("large", 6 * PAGE, "", None)
    assert (memory.cached_tokens(KEYS), memory.cached_tokens(finished)) == (4 * PAGE, 0)


def test_prefix_pages_and_adapters_stand_in_one_line(memory: MemoryManager) -> None:
    """What costs little per page goes first, whatever it is."""
    memory.costs.prefilled(1, 1.0)
    for name, seconds in (("cheap", 0.001), ("dear", 1000.0)):
        memory.admit(name, 1, name, layout_of_pages(2))
        memory.finish_loading(name, seconds)
        memory.release(name, name, 0)
    leave(memory, "s", KEYS)
    seen = []
    for num_pages in (4, 8):
        memory.admit("large", num_pages * PAGE, "", None)
        seen.append(({adapter.adapter_version for adapter in memory.adapters}, memory.counts().prefix))
        memory.release("large", "", 0)
    assert seen == [({"dear"}, 4), ({"dear"}, 0)]


def leave_page(memory: MemoryManager, adapter: str, key: bytes, requests: int = 1) -> None:
    """One page under an adapter that `requests` requests wanted, the last of which has just let go of it."""
    layout = layout_of_pages(1) if adapter else None
    for number in range(requests):
        assert memory.admit(str(number), PAGE + 1, adapter, layout, [key])
        if adapter and not number:
            memory.finish_loading(adapter, 1e-6)
        memory.publish(str(number), [key])
    for number in range(requests):
        memory.release(str(number), adapter, 0)


def pass_by(memory: MemoryManager, adapter: str, requests: int = 1) -> None:
    """Requests that find nothing of what there is and leave no page."""
    for _ in range(requests):
        assert memory.admit("passing", 1, adapter, layout_of_pages(1) if adapter else None)
        memory.release("passing", adapter, 0)


def first_to_go(memory: MemoryManager) -> set[bytes]:
    """Prefix pages that one page more costs."""
    before = {page.key for page in memory.prefixes}
    assert memory.grow("taker", memory.kv.room("taker") + 1)
    return before - {page.key for page in memory.prefixes}


@pytest.fixture
def full(memory: MemoryManager) -> MemoryManager:
    """All of the pool is taken but 6 pages: for two adapters, two pages of prefixes, and two to run with."""
    assert memory.admit("taker", (NUM_PAGES - 6) * PAGE, "", None)
    return memory


def fill_up(memory: MemoryManager) -> None:
    """Nothing is free, and nothing yields but prefixes."""
    for adapter in list(memory.adapters):
        memory.adapters.set_operator_pin(adapter.adapter_version, pinned=True)
    assert memory.grow("taker", memory.kv.room("taker") + memory.counts().free * PAGE)


def test_of_two_adapters_pages_the_less_wanted_ones_goes_first(full: MemoryManager) -> None:
    leave_page(full, "often", b"often", requests=2)
    leave_page(full, "rarely", b"rarely")
    fill_up(full)
    assert first_to_go(full) == {b"rarely"}


@pytest.mark.parametrize(("requests", "gone"), [(0, b"other"), (1, b"passed"), (7, b"passed")])
def test_what_its_own_adapters_requests_pass_by_goes_first(full: MemoryManager, requests: int, gone: bytes) -> None:
    """Although the adapter itself is wanted ever more: half of the pages come back at once, the others never."""
    leave_page(full, "a", b"passed", requests=2)
    leave_page(full, "b", b"other")
    for _ in range(1000):
        full.prefixes._chances.ended(0, returned=True)
        full.prefixes._chances.ended(14, returned=False)
    pass_by(full, "a", requests)
    fill_up(full)
    assert first_to_go(full) == {gone}


def test_requests_for_others_make_a_page_no_older(full: MemoryManager) -> None:
    leave_page(full, "a", b"a", requests=2)
    leave_page(full, "b", b"b")
    pass_by(full, "", requests=7)
    fill_up(full)
    assert first_to_go(full) == {b"b"}


def test_what_became_of_pages_is_learned(memory: MemoryManager) -> None:
    """Wanted again by the next request, each of them: then by as good as every one."""
    before = memory.prefixes._chances.of(0)
    for _ in range(100):
        leave(memory, "s", KEYS)
    wanted = memory.prefixes._chances.of(0)
    for number in range(100):
        leave(memory, "s", keys_of([1000 + number] * 4 * PAGE))
    assert before < 0.6 < 0.9 < wanted
    assert memory.prefixes._chances.of(0) < 0.9


def test_a_preempted_sequence_is_not_waited_for_without_end(memory: MemoryManager) -> None:
    compute(memory, "preempted", KEYS)
    memory.release("preempted", "", 0, returning=True)
    pass_by(memory, "", requests=40)
    finished = keys_of([50] * 4 * PAGE)
    leave(memory, "finished", finished)
    memory.admit("large", 6 * PAGE, "", None)
    assert (memory.cached_tokens(KEYS), memory.cached_tokens(finished)) == (0, 4 * PAGE)
