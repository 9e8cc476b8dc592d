"""The contract of a registry: one suite, against SQLite and against a real Redis."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from adapter_store.indexed_registry import IndexedRegistry
from adapter_store.manifest import Manifest, write_version
from adapter_store.metrics import RedisMetrics
from adapter_store.redis_link import RedisLink
from adapter_store.redis_registry import RedisRegistry
from adapter_store.registry import ABSENT, Alias, ModuleEffect, Registry, Totals, Version, WrongVersionError
from adapter_store.sqlite_registry import SqliteRegistry
from common.errors import Unavailable
from common.redis_client import RedisAddress
from tests.adapter_store.redis_server import PATIENT_SECONDS, RedisServer

EFFECT = ModuleEffect("q_proj", 2, 3, 4, 5, 6.5)
FIRST, SECOND = (Version(digit * 64, "base", "float32", 128, 1000, 4, (EFFECT,), "template") for digit in ("1", "2"))
OpenRegistry = Callable[[], Awaitable[Registry]]

_prefixes = itertools.count()


@pytest.fixture(params=["sqlite", "redis"])
async def open_registry(
    request: pytest.FixtureRequest, tmp_path: Path, redis_server: RedisServer
) -> AsyncIterator[OpenRegistry]:
    """Opens registries one after the other on the same volume, which knows two versions."""
    prefix = f"contract-{next(_prefixes)}"
    for folder in ("objects", "staging"):
        (tmp_path / folder).mkdir()
    for version in (FIRST, SECOND):
        (tmp_path / "objects" / version.digest).mkdir()
        write_version(tmp_path / "objects" / version.digest, version, {})
    async with AsyncExitStack() as stack:

        async def open_one() -> Registry:
            manifest, index = Manifest(tmp_path, tmp_path / "staging"), tmp_path / "adapters.db"
            manifest.start()
            registry: Registry | RedisRegistry = SqliteRegistry(index, manifest, kept_removals=2)
            if request.param == "redis":
                link = RedisLink(RedisAddress(redis_server.url, prefix, timeout_seconds=PATIENT_SECONDS))
                metrics = RedisMetrics(CollectorRegistry())
                registry = RedisRegistry(link, index, manifest, metrics, kept_removals=2)
            await registry.open()
            stack.push_async_callback(registry.close)
            return registry

        yield open_one


@pytest.fixture
async def registry(open_registry: OpenRegistry) -> Registry:
    registry = await open_registry()
    for version in (FIRST, SECOND):
        await registry.add_version(version)
    return registry


async def point(registry: Registry, adapter_id: str, version: Version = FIRST, now: float = 0.0) -> int:
    alias = await registry.point("t", adapter_id, version.digest, expected=None, now=now)
    return alias.sequence


async def test_a_record_comes_back_as_it_was(registry: Registry) -> None:
    alias = await registry.point("t", "a", FIRST.digest, expected=ABSENT, now=12.5)
    assert await registry.get("t", "a") == alias
    assert (alias.version, alias.created_at, alias.sequence) == (FIRST, 12.5, 1)


async def test_a_version_is_nobodys_until_an_id_points_to_it(registry: Registry) -> None:
    assert await registry.held("t", FIRST.digest) is None
    assert sorted(await registry.garbage()) == [FIRST.digest, SECOND.digest]


async def test_pointing_to_the_same_version_takes_no_sequence(registry: Registry) -> None:
    assert await point(registry, "a", now=1.0) == await point(registry, "a", now=2.0)


@pytest.mark.parametrize("expected", [ABSENT, SECOND.digest])
async def test_a_lost_comparison_tells_the_current_version(registry: Registry, expected: str) -> None:
    await point(registry, "a")
    with pytest.raises(WrongVersionError) as caught:
        await registry.point("t", "a", SECOND.digest, expected=expected, now=0.0)
    assert caught.value.current == FIRST.digest


async def test_of_many_comparisons_at_once_one_wins(registry: Registry) -> None:
    await point(registry, "a")
    moves = [registry.point("t", "a", SECOND.digest, expected=FIRST.digest, now=0.0) for _ in range(20)]
    results = await asyncio.gather(*moves, return_exceptions=True)
    assert sum(isinstance(result, Alias) for result in results) == 1


async def test_a_hold_ends_with_its_release(registry: Registry) -> None:
    await point(registry, "a", FIRST, now=0.0)
    await point(registry, "a", SECOND, now=10.0)
    await registry.release(9.0)
    assert await registry.held("t", FIRST.digest) == FIRST
    await registry.release(10.0)
    assert await registry.held("t", FIRST.digest) is None
    assert await registry.garbage() == [FIRST.digest]


async def test_a_forgotten_version_is_no_garbage(registry: Registry) -> None:
    assert await registry.forget(FIRST.digest)
    assert await registry.forget(SECOND.digest)
    assert await registry.garbage() == []
    assert await registry.totals() == Totals(0, 0)


async def test_removals_beyond_those_kept_make_a_watcher_start_over(registry: Registry) -> None:
    for adapter_id in ("a", "b", "c", "d"):
        await point(registry, adapter_id)
    for adapter_id in ("a", "b", "c"):
        await registry.remove("t", adapter_id, expected=None, now=0.0)
    # Sequence 5 removed "a" and is dropped; 6 and 7 are kept.
    assert (await registry.changes("t", 4)).resync
    changes = await registry.changes("t", 5)
    assert not changes.resync
    assert [(change.sequence, change.adapter_id) for change in changes.changes] == [(6, "b"), (7, "c")]


async def test_an_id_made_again_is_no_removal(registry: Registry) -> None:
    seen = await point(registry, "a")
    await registry.remove("t", "a", expected=None, now=0.0)
    sequence = await point(registry, "a")
    changes = await registry.changes("t", seen)
    assert [(change.sequence, change.alias is None) for change in changes.changes] == [(sequence, False)]


async def test_nobody_waits_for_what_has_happened(registry: Registry) -> None:
    sequence = await point(registry, "a")
    await registry.wait(sequence - 1)


async def test_waits_end_when_the_registry_closes(registry: Registry) -> None:
    waiting = asyncio.create_task(registry.wait(0))
    await asyncio.sleep(0)
    registry.stop_waiting()
    with pytest.raises(Unavailable):
        await waiting


async def test_an_index_that_fails_is_unavailable(registry: Registry) -> None:
    assert isinstance(registry, IndexedRegistry)
    await registry._run(lambda: registry._index.db.execute("DROP TABLE aliases"))
    with pytest.raises(Unavailable, match="registry does not answer"):
        await registry.get("t", "a")


async def test_what_was_is_there_after_a_restart(registry: Registry, open_registry: OpenRegistry) -> None:
    alias = await registry.point("t", "a", FIRST.digest, expected=ABSENT, now=12.5)
    await point(registry, "b", SECOND)
    await registry.remove("t", "b", expected=None, now=0.0)
    await registry.close()
    again = await open_registry()
    assert await again.page("t", after="", limit=9) == [alias]
    assert (await again.changes("t", 0)).through == 3


@pytest.mark.parametrize("spoil", ["missing", "older"])
async def test_an_index_is_made_again_from_the_manifest(
    registry: Registry, open_registry: OpenRegistry, tmp_path: Path, spoil: str
) -> None:
    first = await point(registry, "a")
    await registry.close()
    index = tmp_path / "adapters.db"
    old = index.read_bytes()
    registry = await open_registry()
    moved = await point(registry, "a", SECOND)
    await registry.remove("t", "a", expected=None, now=1.0)
    last = await point(registry, "b")
    await registry.close()
    index.unlink()
    if spoil == "older":
        index.write_bytes(old)
    again = await open_registry()
    assert first < moved < last
    assert [(alias.adapter_id, alias.sequence) for alias in await again.page("t", after="", limit=9)] == [("b", last)]
    assert await again.held("t", SECOND.digest) == SECOND
    assert await point(again, "c") > last


async def test_changes_that_nobody_needs_are_removed_from_the_manifest(registry: Registry, tmp_path: Path) -> None:
    for now, version in enumerate((FIRST, SECOND, FIRST, SECOND)):
        await point(registry, "a", version, now=now)
    last = await point(registry, "b")
    await registry.release(100.0)
    assert [int(path.name) for path in sorted((tmp_path / "journal").iterdir())] == [last - 1, last]


async def test_totals_of_a_tenant_are_its_own(registry: Registry) -> None:
    await point(registry, "a")
    await point(registry, "b")
    await registry.point("u", "a", FIRST.digest, expected=None, now=0.0)
    assert await registry.totals("t") == Totals(2, 2000)
    assert await registry.totals() == Totals(3, 2000)
