"""Redis killed, paused, flushed, rolled back, full and read-only under a running store: rows B 11 to 14."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from adapter_store.service import StoreService
from common.channel import connect
from common.errors import NotFound, ResourceExhausted, Unavailable
from loraplex.v1 import adapter_store_pb2 as pb
from tests.adapter_store.conftest import StartStore
from tests.adapter_store.crafted import make_files
from tests.adapter_store.fakes import StoreClient
from tests.adapter_store.polling import eventually
from tests.adapter_store.redis_server import PATIENT_SECONDS, RedisServer

# Rows allow a twentieth and a tenth of these on a machine that does nothing else: 0.3 s and 2 s.
REFUSED_SECONDS, BACK_SECONDS = 6.0, 20.0
# Enough that they would take longer than that if each waited for the one before, 0.15 s long.
NUM_REMOVALS = 100

Connect = Callable[[StoreService], StoreClient]


@pytest.fixture
async def client_of() -> AsyncIterator[Connect]:
    async with AsyncExitStack() as stack:

        def client(service: StoreService) -> StoreClient:
            channel = connect(service.server.address)
            stack.push_async_callback(channel.close)
            return StoreClient(channel)

        yield client


@pytest.fixture
async def service(start_store: StartStore, own_redis: RedisServer, request: pytest.FixtureRequest) -> StoreService:
    # Only a Redis that is paused is told from a slow one by the timeout.
    timeout = {} if "b12" in request.node.name else {"redis_timeout_seconds": PATIENT_SECONDS}
    return await start_store(redis=own_redis.url, **timeout)


@pytest.fixture
def client(service: StoreService, client_of: Connect) -> StoreClient:
    return client_of(service)


async def put(client: StoreClient, adapter_id: str, seed: int = 0) -> pb.Adapter:
    return (await client.upload(adapter_id, make_files(seed), replace=True)).adapter


async def put_patiently(client: StoreClient, adapter_id: str) -> pb.Adapter:
    """Where Redis has little time for an answer, which a busy machine may not give it."""
    return await eventually(lambda: put(client, adapter_id))


async def assert_reads_go_on(client: StoreClient, adapter: pb.Adapter) -> None:
    assert await client.get(adapter.adapter_id) == adapter
    assert adapter in (await client.page()).adapters
    assert (await client.fetch(adapter.adapter_version)).data.size == adapter.packed_bytes
    async for response in client.watch():
        assert adapter in [change.put for change in response.changes]
        break


async def assert_refused_at_once(call: Awaitable[Any]) -> None:
    started = time.monotonic()
    with pytest.raises(Unavailable):
        await call
    assert time.monotonic() - started < REFUSED_SECONDS


async def back(client: StoreClient, adapter_id: str, seed: int) -> pb.Adapter:
    started = time.monotonic()
    adapter = await eventually(lambda: put(client, adapter_id, seed))
    assert time.monotonic() - started < BACK_SECONDS
    return adapter


async def test_b11_redis_down_at_start(start_store: StartStore, own_redis: RedisServer, client_of: Connect) -> None:
    first = await start_store(redis=own_redis.url, redis_timeout_seconds=PATIENT_SECONDS)
    adapter = await put(client_of(first), "a")
    await first.stop()
    own_redis.stop()
    client = client_of(await start_store(redis=own_redis.url, redis_timeout_seconds=PATIENT_SECONDS))
    await assert_reads_go_on(client, adapter)
    await assert_refused_at_once(put(client, "b"))
    own_redis.start()
    await back(client, "b", 1)
    assert await client.get("a") == adapter


async def test_b11_redis_down_at_run(client: StoreClient, own_redis: RedisServer) -> None:
    adapter = await put(client, "a")
    own_redis.stop()
    await assert_reads_go_on(client, adapter)
    for call in (put(client, "b"), client.delete("a"), client.set_alias("b", adapter.adapter_version)):
        await assert_refused_at_once(call)
    own_redis.start()
    assert (await back(client, "b", 1)).sequence > adapter.sequence
    assert await client.get("a") == adapter


async def test_b12_redis_paused(client: StoreClient, own_redis: RedisServer) -> None:
    adapter = await put_patiently(client, "a")
    own_redis.pause()
    # Removals do not wait for each other before they come to Redis.
    calls = [assert_refused_at_once(client.set_alias(f"b{i}", adapter.adapter_version)) for i in range(5)]
    calls += [assert_refused_at_once(client.delete("a")) for _ in range(NUM_REMOVALS)]
    await asyncio.gather(*calls)
    await assert_reads_go_on(client, adapter)
    own_redis.resume()
    await back(client, "c", 1)


async def test_b12_a_change_that_redis_made_after_its_caller_gave_up_is_whole(
    client: StoreClient, own_redis: RedisServer
) -> None:
    adapter = await put_patiently(client, "a")
    own_redis.pause()
    with pytest.raises(Unavailable):
        await client.set_alias("b", adapter.adapter_version)
    own_redis.resume()
    await back(client, "c", 1)
    try:
        assert (await client.get("b")).adapter_version == adapter.adapter_version
    except NotFound:
        await client.set_alias("b", adapter.adapter_version)


@pytest.mark.parametrize("restart", [False, True], ids=["running", "restarted"])
async def test_b13_redis_lost_its_data(
    start_store: StartStore, own_redis: RedisServer, client_of: Connect, restart: bool
) -> None:
    service = await start_store(redis=own_redis.url, redis_timeout_seconds=PATIENT_SECONDS)
    client = client_of(service)
    kept, gone = await put(client, "a"), await put(client, "gone", 1)
    await client.delete("gone")
    if restart:
        await service.stop()
    own_redis.call("FLUSHALL")
    if restart:
        client = client_of(await start_store(redis=own_redis.url, redis_timeout_seconds=PATIENT_SECONDS))
    await assert_reads_go_on(client, kept)
    moved = await put(client, "a", 2)
    assert moved.sequence > gone.sequence + 1
    with pytest.raises(NotFound):
        await client.get("gone")


@pytest.mark.parametrize("restart", [False, True], ids=["running", "restarted"])
async def test_b13_redis_rolled_back(
    start_store: StartStore, own_redis: RedisServer, client_of: Connect, restart: bool
) -> None:
    service = await start_store(redis=own_redis.url, redis_timeout_seconds=PATIENT_SECONDS)
    client = client_of(service)
    await put(client, "a", 0)
    await put(client, "deleted", 1)
    saved = own_redis.save()
    newer = await put(client, "a", 2)
    await client.delete("deleted")
    if restart:
        await service.stop()
    own_redis.roll_back(saved)
    if restart:
        client = client_of(await start_store(redis=own_redis.url, redis_timeout_seconds=PATIENT_SECONDS))
    assert await client.get("a") == newer
    last = await back(client, "b", 3)
    assert last.sequence > newer.sequence + 1
    assert await client.get("a") == newer
    with pytest.raises(NotFound):
        await client.get("deleted")


async def test_b13_a_roll_back_that_nobody_saw_is_found_by_its_sequence(
    client: StoreClient, service: StoreService, own_redis: RedisServer, data_dir: Path
) -> None:
    adapter = await put(client, "a")
    # Another store's change, of which Redis has forgotten before this store heard of it.
    record = {"tenant": client.tenant, "adapter_id": "theirs", "digest": adapter.adapter_version, "at": 1.0}
    (data_dir / "journal" / f"{adapter.sequence + 1:020d}").write_text(json.dumps(record))
    with pytest.raises(Unavailable):
        await client.set_alias("ours", adapter.adapter_version)
    later = await back(client, "b", 1)
    assert later.sequence > adapter.sequence + 1
    assert (await client.get("theirs")).adapter_version == adapter.adapter_version


async def test_b13_a_watcher_of_sequences_that_are_no_more_starts_over(
    client: StoreClient, own_redis: RedisServer
) -> None:
    adapter = await put(client, "a")
    watch = client.watch(after=adapter.sequence)
    assert (await anext(watch)).caught_up
    own_redis.call("FLUSHALL")
    response = await asyncio.wait_for(anext(watch), timeout=100)
    assert response.resync
    assert [change.put for change in response.changes] == [adapter]
    assert (await anext(watch)).caught_up


async def test_b14_redis_full(client: StoreClient, own_redis: RedisServer, data_dir: Path) -> None:
    adapter = await put(client, "a")
    own_redis.call("CONFIG", "SET", "maxmemory", "1")
    with pytest.raises(ResourceExhausted) as caught:
        await put(client, "b", 1)
    assert caught.value.reason == "REGISTRY_FULL"
    with pytest.raises(ResourceExhausted):
        await client.set_alias("b", adapter.adapter_version)
    await assert_reads_go_on(client, adapter)
    with pytest.raises(NotFound):
        await client.get("b")
    assert list((data_dir / "instances" / "0" / "staging").iterdir()) == []
    own_redis.call("CONFIG", "SET", "maxmemory", "0")
    await back(client, "b", 1)


async def test_b14_redis_read_only(client: StoreClient, own_redis: RedisServer) -> None:
    adapter = await put(client, "a")
    own_redis.call("REPLICAOF", "127.0.0.1", "1")
    await assert_refused_at_once(client.set_alias("b", adapter.adapter_version))
    await assert_reads_go_on(client, adapter)
    own_redis.call("REPLICAOF", "NO", "ONE")
    await back(client, "b", 1)


async def test_every_acknowledged_upload_outlives_kills_of_redis(client: StoreClient, own_redis: RedisServer) -> None:
    def kill_and_start() -> None:
        own_redis.stop()
        own_redis.start()

    acknowledged: dict[str, str] = {}
    for seed in range(0, 24, 3):
        # One upload meets the kill wherever it is, the next ones come after it.
        struck = put(client, f"a{seed}", seed)
        result, _ = await asyncio.gather(struck, asyncio.to_thread(kill_and_start), return_exceptions=True)
        if isinstance(result, pb.Adapter):
            acknowledged[f"a{seed}"] = result.adapter_version
        for after in (seed + 1, seed + 2):
            adapter = await eventually(partial(put, client, f"a{after}", after))
            acknowledged[f"a{after}"] = adapter.adapter_version
    assert {id_: (await client.get(id_)).adapter_version for id_ in acknowledged} == acknowledged


async def test_gauges_tell_of_redis(client: StoreClient, service: StoreService, own_redis: RedisServer) -> None:
    def up() -> float | None:
        return service.server.registry.get_sample_value("loraplex_redis_up")

    adapter = await put(client, "a")
    assert up() == 1
    own_redis.stop()
    with pytest.raises(Unavailable):
        await client.set_alias("b", adapter.adapter_version)
    assert up() == 0
    assert (service.server.registry.get_sample_value("loraplex_store_index_age_seconds") or 0) > 0


async def test_the_stores_commands_of_redis_are_timed(client: StoreClient, service: StoreService) -> None:
    def commands() -> float:
        return service.server.registry.get_sample_value("loraplex_redis_command_seconds_count") or 0.0

    before = commands()
    await put(client, "a")
    assert commands() > before
