"""Which page is where means nothing: every page of the pool moves between two steps and no token changes."""

import random
from pathlib import Path

import pytest

from gpu_worker.memory.allocator import PageKind
from gpu_worker.memory.manager import MemoryManager
from gpu_worker.memory.pool import PagePool
from tests.gpu_worker.engine_driver import EngineDriver
from tests.gpu_worker.tiny_model import TinyAdapter

PROMPT = list(range(2, 25))
ADAPTERS = ("", "rank-1", "rank-3", "rank-8")
NUM_PAGES = 120


def permute(memory: MemoryManager, pool: PagePool, seed: int, *, tables: bool = True) -> None:
    """Moves the bytes of page `p` to `to[p]`, and every reference with them; without `tables` the bytes alone."""
    to = list(range(memory.num_pages))
    random.Random(seed).shuffle(to)
    moved = pool.bytes.clone()
    moved[to] = pool.bytes
    pool.bytes.copy_(moved)
    if not tables:
        return
    allocator = memory._allocator
    allocator._free = [to[page] for page in allocator._free]
    kinds = [PageKind.FREE] * memory.num_pages
    for page, kind in enumerate(allocator._kinds):
        kinds[to[page]] = kind
    allocator._kinds = kinds
    for table in memory.kv._tables.values():
        table.pages[:] = [to[page] for page in table.pages]
    for prefix in memory.prefixes:
        prefix.page = to[prefix.page]
    for adapter in memory.adapters:
        adapter.pages[:] = [to[page] for page in adapter.pages]
        # Whoever remembers where it was must look again.
        adapter.load_id += 1_000_000
    memory.check_integrity()


def answers(driver: EngineDriver, *, every: int = 0, tables: bool = True) -> dict[str, list[int]]:
    """Two rounds over all adapters at once, so that the second has hits; pages move before every `every`-th step."""
    memory, pool = driver.engine._memory, driver.engine._runner._pool
    for turn in range(2):
        for adapter in ADAPTERS:
            driver.offer(f"{adapter}/{turn}", PROMPT, adapter, max_tokens=16)
        steps = 0
        while len(driver.ended) < len(ADAPTERS) * (turn + 1):
            if driver.memory.loading_pages:
                driver.wait_for_load()
            elif every and steps % every == 0:
                permute(memory, pool, seed=steps, tables=tables)
            driver.step()
            steps += 1
    return driver.tokens


@pytest.fixture
def expected(tiny_checkpoint: Path, tiny_adapters: list[TinyAdapter]) -> dict[str, list[int]]:
    return answers(EngineDriver(tiny_checkpoint, tiny_adapters, NUM_PAGES))


@pytest.mark.parametrize("every", [1, 3])
def test_moving_every_page_changes_no_token(
    every: int, expected: dict[str, list[int]], tiny_checkpoint: Path, tiny_adapters: list[TinyAdapter]
) -> None:
    driver = EngineDriver(tiny_checkpoint, tiny_adapters, NUM_PAGES)
    assert answers(driver, every=every) == expected
    assert driver.ended["rank-8/1"].usage.cached_tokens > 0


def test_moving_the_bytes_alone_does(
    expected: dict[str, list[int]], tiny_checkpoint: Path, tiny_adapters: list[TinyAdapter]
) -> None:
    driver = EngineDriver(tiny_checkpoint, tiny_adapters, NUM_PAGES)
    assert answers(driver, every=3, tables=False) != expected
