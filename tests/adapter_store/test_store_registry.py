"""The contract of a registry, as any implementation must keep it."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from adapter_store.registry import ABSENT, ModuleEffect, Totals, Version, WrongVersionError
from adapter_store.sqlite_registry import SqliteRegistry
from common.errors import Unavailable

EFFECT = ModuleEffect("q_proj", 2, 3, 4, 5, 6.5)
FIRST, SECOND = (Version(digit * 64, "base", "float32", 128, 1000, 4, (EFFECT,), "template") for digit in ("1", "2"))


@pytest.fixture
async def registry(tmp_path: Path) -> AsyncIterator[SqliteRegistry]:
    registry = SqliteRegistry(tmp_path / "adapters.db", kept_removals=2)
    await registry.open()
    for version in (FIRST, SECOND):
        await registry.add_version(version)
    yield registry
    await registry.close()


async def point(registry: SqliteRegistry, adapter_id: str, version: Version = FIRST, now: float = 0.0) -> int:
    alias = await registry.point("t", adapter_id, version.digest, expected=None, now=now)
    return alias.sequence


async def test_a_record_comes_back_as_it_was(registry: SqliteRegistry) -> None:
    alias = await registry.point("t", "a", FIRST.digest, expected=ABSENT, now=12.5)
    assert await registry.get("t", "a") == alias
    assert (alias.version, alias.created_at, alias.sequence) == (FIRST, 12.5, 1)


async def test_a_version_is_nobodys_until_an_id_points_to_it(registry: SqliteRegistry) -> None:
    assert await registry.held("t", FIRST.digest) is None
    assert sorted(await registry.garbage()) == [FIRST.digest, SECOND.digest]


async def test_pointing_to_the_same_version_takes_no_sequence(registry: SqliteRegistry) -> None:
    assert await point(registry, "a", now=1.0) == await point(registry, "a", now=2.0)


@pytest.mark.parametrize("expected", [ABSENT, SECOND.digest])
async def test_a_lost_comparison_tells_the_current_version(registry: SqliteRegistry, expected: str) -> None:
    await point(registry, "a")
    with pytest.raises(WrongVersionError) as caught:
        await registry.point("t", "a", SECOND.digest, expected=expected, now=0.0)
    assert caught.value.current == FIRST.digest


async def test_of_many_comparisons_at_once_one_wins(registry: SqliteRegistry) -> None:
    await point(registry, "a")
    moves = [registry.point("t", "a", SECOND.digest, expected=FIRST.digest, now=0.0) for _ in range(20)]
    results = await asyncio.gather(*moves, return_exceptions=True)
    assert sum(not isinstance(result, WrongVersionError) for result in results) == 1


async def test_a_hold_ends_with_its_release(registry: SqliteRegistry) -> None:
    await point(registry, "a", FIRST, now=0.0)
    await point(registry, "a", SECOND, now=10.0)
    await registry.release(9.0)
    assert await registry.held("t", FIRST.digest) == FIRST
    await registry.release(10.0)
    assert await registry.held("t", FIRST.digest) is None
    assert await registry.garbage() == [FIRST.digest]


async def test_a_forgotten_version_is_no_garbage(registry: SqliteRegistry) -> None:
    await registry.forget(FIRST.digest)
    await registry.forget(SECOND.digest)
    assert await registry.garbage() == []
    assert await registry.totals() == Totals(0, 0)


async def test_removals_beyond_those_kept_make_a_watcher_start_over(registry: SqliteRegistry) -> None:
    for adapter_id in ("a", "b", "c", "d"):
        await point(registry, adapter_id)
    for adapter_id in ("a", "b", "c"):
        await registry.remove("t", adapter_id, expected=None, now=0.0)
    # Sequence 5 removed "a" and is dropped; 6 and 7 are kept.
    assert (await registry.changes("t", 4)).resync
    changes = await registry.changes("t", 5)
    assert not changes.resync
    assert [(change.sequence, change.adapter_id) for change in changes.changes] == [(6, "b"), (7, "c")]


async def test_an_id_made_again_is_no_removal(registry: SqliteRegistry) -> None:
    seen = await point(registry, "a")
    await registry.remove("t", "a", expected=None, now=0.0)
    sequence = await point(registry, "a")
    changes = await registry.changes("t", seen)
    assert [(change.sequence, change.alias is None) for change in changes.changes] == [(sequence, False)]


async def test_nobody_waits_for_what_has_happened(registry: SqliteRegistry) -> None:
    sequence = await point(registry, "a")
    await registry.wait(sequence - 1)


async def test_waits_end_when_the_registry_closes(registry: SqliteRegistry) -> None:
    waiting = asyncio.create_task(registry.wait(0))
    await asyncio.sleep(0)
    registry.stop_waiting()
    with pytest.raises(Unavailable):
        await waiting


async def test_a_registry_that_fails_is_unavailable(registry: SqliteRegistry, tmp_path: Path) -> None:
    await registry._run(lambda: registry._db.execute("DROP TABLE aliases"))
    with pytest.raises(Unavailable, match="registry does not answer"):
        await registry.get("t", "a")
