"""Several stores on one volume and one Redis."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from adapter_store.service import StoreService
from common.channel import connect
from common.errors import Conflict, NotFound
from tests.adapter_store.conftest import GRACE_SECONDS, StartStore
from tests.adapter_store.crafted import make_files
from tests.adapter_store.fakes import FakeClock, StoreClient
from tests.adapter_store.polling import eventually
from tests.adapter_store.redis_server import PATIENT_SECONDS, RedisServer

Pair = tuple[StoreService, StoreService]


@pytest.fixture
async def services(start_store: StartStore, redis_server: RedisServer, redis_prefix: str) -> Pair:
    options = {"redis": redis_server.url, "redis_prefix": redis_prefix, "redis_timeout_seconds": PATIENT_SECONDS}
    return await start_store(**options), await start_store(**options)


@pytest.fixture
async def clients(services: Pair) -> AsyncIterator[tuple[StoreClient, StoreClient]]:
    async with AsyncExitStack() as stack:
        channels = [connect(service.server.address) for service in services]
        for channel in channels:
            stack.push_async_callback(channel.close)
        first, second = (StoreClient(channel) for channel in channels)
        yield first, second


Clients = tuple[StoreClient, StoreClient]


async def test_what_one_store_took_the_other_serves_at_once(clients: Clients) -> None:
    first, second = clients
    adapter = (await first.upload("a", make_files())).adapter
    assert await second.get("a") == adapter
    assert (await second.fetch(adapter.adapter_version)).data.size == adapter.packed_bytes


async def test_a_move_reaches_the_other_store(clients: Clients) -> None:
    first, second = clients
    await first.upload("a", make_files(0))
    moved = (await first.upload("a", make_files(1), replace=True)).adapter

    async def is_there() -> bool:
        return await second.get("a") == moved

    await eventually(is_there)


async def test_a_watcher_of_one_store_hears_of_the_other(clients: Clients) -> None:
    first, second = clients
    watch = second.watch()
    assert (await anext(watch)).caught_up
    adapter = (await first.upload("a", make_files())).adapter
    response = await asyncio.wait_for(anext(watch), timeout=100)
    assert [change.put for change in response.changes] == [adapter]
    await first.delete("a")
    response = await asyncio.wait_for(anext(watch), timeout=100)
    assert response.changes[0].removal.adapter_id == "a"


async def test_of_many_moves_at_two_stores_one_wins(clients: Clients) -> None:
    versions = [(await clients[0].upload(f"v{seed}", make_files(seed))).adapter.adapter_version for seed in range(6)]
    await clients[0].set_alias("a", versions[0])
    await clients[1].get("a")
    moves = [clients[i % 2].set_alias("a", versions[i], expected_version=versions[0]) for i in range(1, 6)]
    results = await asyncio.gather(*moves, return_exceptions=True)
    assert sum(not isinstance(result, BaseException) for result in results) == 1
    assert {type(result) for result in results if isinstance(result, BaseException)} == {Conflict}


async def test_sequences_of_two_stores_are_one_row(clients: Clients) -> None:
    uploads: list[Awaitable[object]] = [clients[seed % 2].upload(f"a{seed}", make_files(seed)) for seed in range(8)]
    await asyncio.gather(*uploads)
    sequences = sorted(adapter.sequence for adapter in (await clients[0].page()).adapters)
    assert sequences == list(range(1, 9))


async def test_a_store_leaves_alone_what_the_other_receives(
    clients: Clients, services: Pair, start_store: StartStore, redis_server: RedisServer, redis_prefix: str
) -> None:
    staged = services[0].store.stage()
    await start_store(redis=redis_server.url, redis_prefix=redis_prefix, redis_timeout_seconds=PATIENT_SECONDS)
    assert staged.directory.exists()


async def test_one_store_sweeps_for_all(clients: Clients, services: Pair, clock: FakeClock, data_dir: Path) -> None:
    first, second = clients
    version = (await first.upload("a", make_files())).adapter.adapter_version
    await first.delete("a")
    clock.seconds += 2 * GRACE_SECONDS
    await services[1].store.sweep()
    assert list((data_dir / "objects").iterdir()) == []
    await services[0].store.sweep()
    with pytest.raises(NotFound):
        await first.fetch(version)
    assert (await second.upload("b", make_files())).created
    assert (await first.fetch(version)).data.size > 0


async def test_a_sweep_waits_for_a_publisher(
    clients: Clients, services: Pair, clock: FakeClock, data_dir: Path
) -> None:
    await clients[0].upload("a", make_files())
    await clients[0].delete("a")
    clock.seconds += 2 * GRACE_SECONDS
    publishing = services[0].store._blobs.begin_publish()
    assert publishing is not None
    await services[1].store.sweep()
    assert len(list((data_dir / "objects").iterdir())) == 1
    publishing.close()


@pytest.mark.parametrize("shared_first", [True, False])
async def test_a_store_without_redis_shares_with_nobody(
    start_store: StartStore, redis_server: RedisServer, redis_prefix: str, shared_first: bool
) -> None:
    shared: dict[str, str | float] = {
        "redis": redis_server.url,
        "redis_prefix": redis_prefix,
        "redis_timeout_seconds": PATIENT_SECONDS,
    }
    alone: dict[str, str | float] = {}
    first, second = (shared, alone) if shared_first else (alone, shared)
    await start_store(**first)
    with pytest.raises(OSError, match="another adapter store uses"):
        await start_store(**second)


async def test_a_volume_moves_from_sqlite_to_redis(
    start_store: StartStore, redis_server: RedisServer, redis_prefix: str
) -> None:
    alone = await start_store()
    async with connect(alone.server.address) as channel:
        adapter = (await StoreClient(channel).upload("a", make_files())).adapter
    await alone.stop()
    shared = await start_store(redis=redis_server.url, redis_prefix=redis_prefix, redis_timeout_seconds=PATIENT_SECONDS)
    async with connect(shared.server.address) as channel:
        assert await StoreClient(channel).get("a") == adapter
