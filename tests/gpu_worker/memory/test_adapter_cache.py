"""Adapters in pages: loading, used, cold; and where a kernel finds their modules."""

import pytest

from common.packing import MODULE_INDEX, ModuleSpec, plan
from gpu_worker.memory.adapter_cache import AdapterCache, AdapterInUseError, ModuleTable, ResidentAdapter
from gpu_worker.memory.allocator import OutOfPagesError, PageAllocator, PageKind
from gpu_worker.memory.costs import CostModel
from gpu_worker.memory.demand import Demand
from gpu_worker.memory.eviction import EvictionQueue, LeastWorth
from tests.gpu_worker.support import SMALL_PAGES, layout_of_pages

NUM_PAGES = 10


@pytest.fixture
def allocator() -> PageAllocator:
    return PageAllocator(NUM_PAGES)


@pytest.fixture
def queue() -> EvictionQueue:
    return EvictionQueue(LeastWorth())


@pytest.fixture
def cache(allocator: PageAllocator, queue: EvictionQueue) -> AdapterCache:
    return AdapterCache(SMALL_PAGES, allocator, queue, CostModel(), Demand())


def load(cache: AdapterCache, name: str, num_pages: int = 2) -> ResidentAdapter:
    cache.add_loading(name, layout_of_pages(num_pages))
    return cache.finish_loading(name)


def evictable(cache: AdapterCache) -> list[str]:
    return [adapter.adapter_version for adapter in cache if adapter.evictable]


def test_an_adapter_takes_the_pages_its_bytes_take(cache: AdapterCache, allocator: PageAllocator) -> None:
    cache.add_loading("a", layout_of_pages(3))
    assert allocator.counts().loading == 3


def test_a_loaded_adapter_holds_adapter_pages(cache: AdapterCache, allocator: PageAllocator) -> None:
    load(cache, "a", 3)
    assert (allocator.counts().loading, allocator.counts().adapters) == (0, 3)


def test_an_adapter_that_does_not_fit_leaves_no_trace(cache: AdapterCache, allocator: PageAllocator) -> None:
    with pytest.raises(OutOfPagesError):
        cache.add_loading("a", layout_of_pages(NUM_PAGES + 1))
    assert (cache.get("a"), allocator.num_free) == (None, NUM_PAGES)


def test_a_second_load_of_a_digest_is_another_load(cache: AdapterCache) -> None:
    load(cache, "a")
    first = cache.remove("a").load_id
    load(cache, "a")
    second = cache.get("a")
    assert second is not None
    assert second.load_id != first


def test_a_loading_adapter_is_not_evictable(cache: AdapterCache) -> None:
    cache.add_loading("a", layout_of_pages(1))
    assert evictable(cache) == []


def test_a_used_adapter_is_not_evictable(cache: AdapterCache) -> None:
    cache.acquire(load(cache, "a"))
    assert evictable(cache) == []


def test_an_adapter_whose_last_user_left_is_evictable(cache: AdapterCache, queue: EvictionQueue) -> None:
    adapter = load(cache, "a", 3)
    for _ in range(2):
        cache.acquire(adapter)
    cache.release(adapter)
    used = queue.evictable_pages
    cache.release(adapter)
    assert (used, queue.evictable_pages) == (0, 3)


def test_a_pinned_adapter_is_not_evictable(cache: AdapterCache) -> None:
    load(cache, "a")
    cache.set_operator_pin("a", pinned=True)
    assert evictable(cache) == []


def test_an_unpinned_adapter_is_evictable_again(cache: AdapterCache) -> None:
    load(cache, "a")
    cache.set_operator_pin("a", pinned=True)
    cache.set_operator_pin("a", pinned=False)
    assert evictable(cache) == ["a"]


def test_an_adapter_that_a_launched_step_reads_is_not_evictable(cache: AdapterCache, queue: EvictionQueue) -> None:
    adapter = load(cache, "a")
    cache.acquire(adapter)
    cache.touch("a", step=1)
    cache.release(adapter)
    before = evictable(cache)
    queue.complete(1)
    assert (before, evictable(cache)) == ([], ["a"])


def test_removed_pages_wait_for_the_step_that_reads_them(cache: AdapterCache, allocator: PageAllocator) -> None:
    load(cache, "a", 2)
    cache.touch("a", step=1)
    cache.remove("a")
    assert allocator.counts().quarantined == 2


def test_a_used_adapter_is_not_removed(cache: AdapterCache) -> None:
    adapter = load(cache, "a")
    for _ in range(2):
        cache.acquire(adapter)
    with pytest.raises(AdapterInUseError, match="2 running sequences"):
        cache.remove("a")


def test_a_pinned_adapter_is_not_removed(cache: AdapterCache) -> None:
    load(cache, "a")
    cache.set_operator_pin("a", pinned=True)
    with pytest.raises(AdapterInUseError, match="operator"):
        cache.remove("a")


def test_an_adapter_that_is_not_here_cannot_be_pinned(cache: AdapterCache) -> None:
    with pytest.raises(KeyError):
        cache.set_operator_pin("a", pinned=True)


def test_a_refused_removal_frees_nothing(cache: AdapterCache, allocator: PageAllocator) -> None:
    load(cache, "a", 2)
    cache.set_operator_pin("a", pinned=True)
    with pytest.raises(AdapterInUseError):
        cache.remove("a")
    allocator.check_integrity([(PageKind.ADAPTER, adapter.pages) for adapter in cache])


def test_the_table_says_where_a_module_is() -> None:
    layout = plan([ModuleSpec(0, "q_proj", 3, 2.0, 32, 32), ModuleSpec(1, "down_proj", 5, 0.5, 64, 32)], "float32")
    table, cell = ModuleTable.of(layout, num_layers=2), (1, MODULE_INDEX["down_proj"])
    # q: 3 rows of A and 3 of B, a unit each
    assert (table.start_unit[cell], table.lora_rank[cell], table.scaling[cell]) == (6, 5, 0.5)


def test_an_absent_module_has_rank_0() -> None:
    layout = plan([ModuleSpec(0, "q_proj", 3, 2.0, 32, 32)], "float32")
    table = ModuleTable.of(layout, num_layers=2)
    assert table.lora_rank.sum() == 3
