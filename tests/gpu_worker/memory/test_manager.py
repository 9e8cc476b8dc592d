"""The façade: admission is both or nothing, cold adapters yield in order, changes of residency are told."""

import ast
from pathlib import Path

import pytest

import gpu_worker.memory
from gpu_worker.memory.adapter_cache import AdapterInUseError
from gpu_worker.memory.manager import MemoryManager
from tests.gpu_worker.support import SMALL_PAGES, layout_of_pages

NUM_PAGES = 10
PAGE = SMALL_PAGES.page_size


@pytest.fixture
def memory() -> MemoryManager:
    return MemoryManager(SMALL_PAGES, NUM_PAGES)


def leave_cold(memory: MemoryManager, name: str, num_pages: int) -> None:
    """An adapter that was used and is not used any more."""
    assert memory.admit(f"user of {name}", 1, name, layout_of_pages(num_pages))
    memory.finish_loading(name)
    memory.release(f"user of {name}", name, 0)


def resident(memory: MemoryManager) -> set[str]:
    return {adapter.adapter_version for adapter in memory.adapters}


def test_admission_takes_kv_and_the_adapter(memory: MemoryManager) -> None:
    memory.admit("s", 2 * PAGE + 1, "a", layout_of_pages(4))
    assert (memory.counts().kv, memory.counts().loading) == (3, 4)


def test_admission_takes_nothing_when_the_adapter_does_not_fit(memory: MemoryManager) -> None:
    assert not memory.admit("s", 3 * PAGE, "a", layout_of_pages(8))
    assert (memory.counts().free, resident(memory)) == (NUM_PAGES, set())


def test_a_base_sequence_takes_kv_only(memory: MemoryManager) -> None:
    memory.admit("s", NUM_PAGES * PAGE, "", None)
    assert memory.counts().kv == NUM_PAGES


def test_two_sequences_share_an_adapter(memory: MemoryManager) -> None:
    for name in ("s", "t"):
        memory.admit(name, PAGE, "a", layout_of_pages(8))
    assert (memory.counts().loading, memory.counts().kv) == (8, 2)


def test_a_refused_admission_evicts_nobody(memory: MemoryManager) -> None:
    leave_cold(memory, "a", 3)
    assert not memory.admit("s", (NUM_PAGES + 1) * PAGE, "", None)
    assert resident(memory) == {"a"}


def test_only_as_many_are_evicted_as_are_needed(memory: MemoryManager) -> None:
    for name in ("a", "b", "c"):
        leave_cold(memory, name, 3)
    memory.admit("s", 4 * PAGE, "", None)
    assert resident(memory) == {"b", "c"}


def test_admission_does_not_evict_its_own_adapter(memory: MemoryManager) -> None:
    leave_cold(memory, "a", 3)
    leave_cold(memory, "b", 3)
    memory.admit("s", 5 * PAGE, "a", layout_of_pages(3))
    assert resident(memory) == {"a"}


def test_a_sequence_that_needs_the_pages_of_its_own_adapter_is_refused(memory: MemoryManager) -> None:
    leave_cold(memory, "a", 3)
    assert not memory.admit("s", 8 * PAGE, "a", layout_of_pages(3))


def test_growth_takes_the_missing_pages_only(memory: MemoryManager) -> None:
    memory.admit("s", PAGE, "", None)
    memory.grow("s", PAGE + 1)
    assert memory.counts().kv == 2


def test_refused_growth_takes_nothing(memory: MemoryManager) -> None:
    memory.admit("s", PAGE, "", None)
    assert not memory.grow("s", (NUM_PAGES + 1) * PAGE)
    assert memory.counts().kv == 1


def test_growth_evicts_a_cold_adapter(memory: MemoryManager) -> None:
    leave_cold(memory, "a", 3)
    memory.admit("s", 7 * PAGE, "", None)
    assert memory.grow("s", 8 * PAGE)
    assert memory.evictions == 1


def test_a_release_leaves_the_adapter_resident(memory: MemoryManager) -> None:
    leave_cold(memory, "a", 3)
    assert memory.counts().adapters == memory.evictable_pages == 3


def test_released_pages_wait_for_the_step_that_writes_them(memory: MemoryManager) -> None:
    memory.admit("s", PAGE, "", None)
    memory.release("s", "", last_step=1)
    quarantined = memory.counts().quarantined
    memory.complete(1)
    assert (quarantined, memory.counts().free) == (1, NUM_PAGES)


def test_an_adapter_in_use_is_not_evicted(memory: MemoryManager) -> None:
    memory.admit("s", PAGE, "a", layout_of_pages(1))
    memory.finish_loading("a")
    with pytest.raises(AdapterInUseError, match="1 running sequences"):
        memory.evict("a")


def test_a_loading_adapter_is_not_evicted(memory: MemoryManager) -> None:
    memory.admit("s", PAGE, "a", layout_of_pages(1))
    memory.release("s", "a", 0)
    with pytest.raises(AdapterInUseError, match="being loaded"):
        memory.evict("a")


def test_an_unknown_adapter_is_not_evicted(memory: MemoryManager) -> None:
    with pytest.raises(KeyError):
        memory.evict("a")


def test_eviction_says_how_many_pages_it_freed(memory: MemoryManager) -> None:
    leave_cold(memory, "a", 3)
    assert memory.evict("a") == 3


def test_a_failed_load_gives_its_pages_back(memory: MemoryManager) -> None:
    memory.admit("s", PAGE, "a", layout_of_pages(3))
    memory.release("s", "a", 0)
    memory.drop_failed("a")
    assert memory.counts().free == NUM_PAGES


def test_an_adapter_cannot_be_pinned_before_it_is_loaded(memory: MemoryManager) -> None:
    memory.admit("s", PAGE, "a", layout_of_pages(3))
    with pytest.raises(KeyError):
        memory.adapters.set_operator_pin("a", pinned=True)


def test_changes_of_residency_are_numbered_without_gaps(memory: MemoryManager) -> None:
    leave_cold(memory, "a", 3)
    memory.evict("a")
    leave_cold(memory, "b", 1)
    changes = [(change.sequence, change.adapter_version, change.resident) for change in memory.take_changes()]
    assert changes == [(1, "a", True), (2, "a", False), (3, "b", True)]


def test_a_change_is_told_once(memory: MemoryManager) -> None:
    leave_cold(memory, "a", 3)
    memory.take_changes()
    assert memory.take_changes() == []


def test_a_failed_load_was_never_resident(memory: MemoryManager) -> None:
    memory.admit("s", PAGE, "a", layout_of_pages(3))
    memory.release("s", "a", 0)
    memory.drop_failed("a")
    assert memory.take_changes() == []


def test_only_the_pool_knows_torch() -> None:
    folder = Path(gpu_worker.memory.__file__).parent
    with_torch = set()
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            with_torch |= {path.name for name in names if name.split(".")[0] == "torch"}
    assert with_torch == {"pool.py"}


@pytest.mark.parametrize(("left", "kept"), [(True, b"a"), (False, b"base")])
def test_pages_whose_adapter_left_carry_its_reload(memory: MemoryManager, left: bool, kept: bytes) -> None:
    """Two cached pages, computed alike; the adapter's was let go of first."""
    for name, adapter, layout in (("a", "a", layout_of_pages(2)), ("base", "", None)):
        assert memory.admit(name, PAGE, adapter, layout)
        if adapter:
            memory.finish_loading(adapter, 9.0)
        memory.publish(name, [name.encode()])
        memory.release(name, adapter, 0)
    if left:
        memory.evict("a")
    else:
        memory.adapters.set_operator_pin("a", pinned=True)
    assert memory.admit("s", (NUM_PAGES - 1 - (0 if left else 2)) * PAGE, "", None)
    assert [page.key for page in memory.prefixes] == [kept]


def test_pages_that_carry_a_reload_yield_when_all_are_wanted(memory: MemoryManager) -> None:
    memory.admit("a", 3 * PAGE, "a", layout_of_pages(2))
    memory.finish_loading("a", 9.0)
    memory.publish("a", [b"0", b"1", b"2"])
    memory.release("a", "a", 0)
    memory.evict("a")
    assert memory.admit("s", NUM_PAGES * PAGE, "", None)
    memory.check_integrity()
