import asyncio
from collections.abc import AsyncIterator

import pytest

from adapter_store.service import StoreService
from common.errors import Unavailable
from loraplex.v1 import adapter_store_pb2 as pb
from tests.adapter_store.crafted import make_files
from tests.adapter_store.fakes import TENANT, StoreClient

Watch = AsyncIterator[pb.WatchAdaptersResponse]


async def put(client: StoreClient, adapter_id: str, seed: int = 0, **options: str) -> pb.Adapter:
    return (await client.upload(adapter_id, make_files(seed), replace=True, **options)).adapter


async def caught_up(watch: Watch) -> tuple[list[pb.AdapterChange], bool]:
    """Changes before `caught_up`, and whether they came with `resync`."""
    changes: list[pb.AdapterChange] = []
    resync = False
    async for response in watch:
        changes.extend(response.changes)
        resync |= response.resync
        if response.caught_up:
            return changes, resync
    raise AssertionError("the watch ended")


async def live(watch: Watch) -> list[pb.AdapterChange]:
    response = await asyncio.wait_for(anext(watch), timeout=100)
    assert not response.caught_up
    assert not response.resync
    return list(response.changes)


async def test_a_new_watcher_gets_everything(client: StoreClient) -> None:
    adapters = [await put(client, adapter_id) for adapter_id in ("b", "a")]
    changes, resync = await caught_up(client.watch())
    assert [change.put for change in changes] == adapters
    assert [change.sequence for change in changes] == [1, 2]
    assert not resync


async def test_an_empty_store_is_caught_up_at_once(client: StoreClient) -> None:
    assert await caught_up(client.watch()) == ([], False)


async def test_changes_come_as_they_happen(client: StoreClient) -> None:
    watch = client.watch()
    await caught_up(watch)
    first = await put(client, "a", 0)
    assert [change.put for change in await live(watch)] == [first]
    second = await put(client, "a", 1)
    assert [change.put for change in await live(watch)] == [second]
    await client.delete("a")
    (change,) = await live(watch)
    assert change.removal == pb.AdapterRemoval(tenant=TENANT, adapter_id="a")
    assert change.sequence == 3


async def test_an_alias_is_a_change(client: StoreClient) -> None:
    version = (await put(client, "a")).adapter_version
    watch = client.watch()
    await caught_up(watch)
    adapter = await client.set_alias("b", version)
    assert [change.put for change in await live(watch)] == [adapter]


async def test_a_no_op_is_no_change(client: StoreClient) -> None:
    await put(client, "a")
    watch = client.watch()
    await caught_up(watch)
    await put(client, "a")
    other = await put(client, "b")
    assert [change.put for change in await live(watch)] == [other]


async def test_a_watcher_that_comes_back_gets_what_it_missed(client: StoreClient) -> None:
    seen = (await put(client, "a")).sequence
    await put(client, "b", 1)
    await client.delete("a")
    moved = await put(client, "b", 2)
    changes, resync = await caught_up(client.watch(after=seen))
    assert [(change.sequence, change.WhichOneof("change")) for change in changes] == [(3, "removal"), (4, "put")]
    assert changes[1].put == moved
    assert not resync


async def test_a_watcher_that_missed_nothing_gets_nothing(client: StoreClient) -> None:
    seen = (await put(client, "a")).sequence
    assert await caught_up(client.watch(after=seen)) == ([], False)


async def test_a_sequence_of_the_future_starts_over(client: StoreClient) -> None:
    adapter = await put(client, "a")
    changes, resync = await caught_up(client.watch(after=adapter.sequence + 1))
    assert [change.put for change in changes] == [adapter]
    assert resync


async def test_starting_over_is_said_by_an_empty_store_too(client: StoreClient) -> None:
    assert await caught_up(client.watch(after=5)) == ([], True)


async def test_a_tenant_watches_its_own(client: StoreClient) -> None:
    await put(client, "before", tenant="other")
    mine = await put(client, "a")
    watch = client.watch()
    changes, _ = await caught_up(watch)
    assert [change.put for change in changes] == [mine]
    await put(client, "after", tenant="other")
    also_mine = await put(client, "b")
    assert [change.put for change in await live(watch)] == [also_mine]


async def test_a_service_watches_every_tenant(client: StoreClient) -> None:
    adapters = [await put(client, "a"), await put(client, "a", tenant="other")]
    changes, _ = await caught_up(client.watch(tenant=""))
    assert [change.put for change in changes] == adapters


async def test_every_watcher_is_woken(client: StoreClient) -> None:
    watches = [client.watch() for _ in range(20)]
    await asyncio.gather(*map(caught_up, watches))
    adapter = await put(client, "a")
    for changes in await asyncio.gather(*map(live, watches)):
        assert [change.put for change in changes] == [adapter]


async def test_a_stopping_store_ends_its_watches(client: StoreClient, service: StoreService) -> None:
    watch = client.watch()
    await caught_up(watch)
    service.store.registry.stop_waiting()
    with pytest.raises(Unavailable) as caught:
        await anext(watch)
    assert caught.value.reason == "STOPPING"
