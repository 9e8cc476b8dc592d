"""Each line of bookkeeping is needed: without it the state machine fails. `docs/memory.md` lists them by method."""

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, Verbosity, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from gpu_worker.memory import adapter_cache, allocator, eviction, kv_cache, prefix_cache
from tests.gpu_worker.memory.machine import MemoryMachine
from tests.gpu_worker.memory.mutants import Mutant, mutants_of

# The machine must fail, not explain itself: nothing is shrunk.
SETTINGS = settings(
    max_examples=400,
    stateful_step_count=50,
    phases=[Phase.generate],
    verbosity=Verbosity.quiet,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
# Who goes first, not who owns what: test_eviction.py and test_demand.py are about these.
ORDER = ("LeastWorth.", "LeastRecentlyUsed.", "CostModel.", "PrefixPage.worth", "ResidentAdapter.worth")
EXEMPT = {
    "PrefixCache.release: page.seconds, page.returning = (seconds, returning)": "order",
    "PrefixCache.release: page.requests, page.released_at = (requests, requests.admitted)": "order",
    "PrefixCache.passed: self._queue.look_again(page)": "order",
    "PrefixCache._settle: if not page.returning:": "order",
    "PrefixCache._settle: self._chances.ended(page.age, returned=returned)": "order",
    "EvictionQueue.add: self._releases += 1": "order",
    "EvictionQueue.add: candidate.release = self._releases": "order",
    "EvictionQueue.look_again: self._void(candidate)": "another ticket voids the entry too; `_valid` bounds the sweep",
    "EvictionQueue.pop: if self._policy.rank(candidate) > rank:": "order",
    "EvictionQueue.pop: continue (2)": "order",
    "EvictionQueue._push: candidate.rank = self._policy.rank(candidate)": "order",
    "EvictionQueue.restore: self._make_evictable(candidate)": "rare in the machine; test_eviction.py",
    "EvictionQueue._push: self._valid += 1": "when void entries are swept out",
    "EvictionQueue._push: if len(self._heap) > 2 * self._valid + _FEW_ENTRIES:": "when void entries are swept out",
    "EvictionQueue._push: self._heap = [entry for entry in self._heap if entry[2].ticket == entry[1]]": "the sweep",
    "EvictionQueue._push: heapify(self._heap)": "the sweep keeps the order as it is",
    "EvictionQueue._void: self._valid -= 1": "when void entries are swept out",
    "AdapterCache.__len__: return len(self._adapters)": "a reader",
    "AdapterCache.add_loading: self._loads += 1": "the runner's key for its tables",
    "AdapterCache.add_loading: requests.reload_seconds_per_page = 0.0": "order",
    "AdapterCache.remove: adapter.requests.withdraw()": "order",
    "AdapterCache.remove: adapter.requests.reload_seconds_per_page = self._load_seconds(adapter) / adapter.num_pages": (
        "order"
    ),
    "AdapterCache._rest: adapter.seconds = self._load_seconds(adapter)": "order",
    "AdapterCache.remove: return adapter": "a convenience for tests",
}
MODULES = (allocator, kv_cache, prefix_cache, eviction, adapter_cache)
# One of each kind, for every run of the tests.
HANDFUL = {
    "PageAllocator.allocate: del self._free[split:]",
    "PageAllocator.relabel: self._tally[kind] += 1",
    "PageAllocator.free: self._quarantine.append((last_step, list(pages)))",
    "PageAllocator.complete: self._quarantine = waiting",
    "KVCache.release: self._allocator.free(table.own_pages(), last_step)",
    "KVCache.start: self._prefixes.acquire(page)",
    "PrefixCache.acquire: self._queue.discard(page)",
    "PrefixCache.publish: parent.children += 1",
    "PrefixCache.evict: del self._pages[page.key]",
    "EvictionQueue.discard: self.evictable_pages -= candidate.num_pages",
    "AdapterCache.release: self._rest(adapter)",
}


def bookkeeping() -> Iterator[Mutant]:
    for module in MODULES:
        for mutant in mutants_of(module):
            if not mutant.name.startswith(ORDER) and "check_integrity" not in mutant.name:
                yield mutant


MUTANTS = {mutant.name: mutant for mutant in bookkeeping()}


def survives(mutant: Mutant) -> bool:
    with mutant.in_place():
        try:
            run_state_machine_as_test(seed(1)(MemoryMachine), settings=SETTINGS)
        except (Exception, pytest.fail.Exception):
            return False
    return True


@pytest.mark.parametrize("name", sorted(HANDFUL))
def test_a_missing_line_is_noticed(name: str) -> None:
    assert not survives(MUTANTS[name])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", sorted(MUTANTS.keys() - EXEMPT.keys() - HANDFUL))
def test_any_missing_line_is_noticed(name: str) -> None:
    assert not survives(MUTANTS[name])


def test_the_machine_passes_when_nothing_is_missing() -> None:
    quick = settings(SETTINGS, max_examples=30)
    run_state_machine_as_test(seed(1)(MemoryMachine), settings=quick)


def test_every_exemption_is_a_line_that_exists() -> None:
    assert EXEMPT.keys() - MUTANTS.keys() == set()


def test_the_real_method_is_back_afterwards() -> None:
    mutant = MUTANTS["PageAllocator.allocate: del self._free[split:]"]
    real = allocator.PageAllocator.allocate.__code__
    with mutant.in_place():
        assert allocator.PageAllocator.allocate.__code__ is not real
    assert allocator.PageAllocator.allocate.__code__ is real
