"""Which adapters resolve, and what happens when the store is asked, changes its mind, or is away."""

from types import SimpleNamespace

import grpc
import pytest

from loraplex.v1 import adapter_store_pb2, gateway_pb2
from tests.gateway.conftest import Fleet, ask, failure, reason_of, retry_seconds_of
from tests.gateway.fakes import VERSION, FakeStore, adapter

Change = adapter_store_pb2.AdapterChange


async def names(fleet: Fleet) -> list[str]:
    listed = await fleet.api.ListModels(gateway_pb2.ListModelsRequest())
    return [model.adapter_id for model in listed.models]


async def listed(fleet: Fleet, expected: list[str]) -> None:
    """Returns once the gateway lists these."""
    while await names(fleet) != expected:
        pass


async def test_a_known_adapter_is_not_asked_for(fleet: Fleet) -> None:
    call = fleet.api.GenerateStream(ask(adapter_id="alpha"))
    await fleet.scheduler.submitted()
    assert fleet.store.asked == []
    call.cancel()


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_an_unknown_adapter_is_asked_for_once_and_not_found(fleet: Fleet, method: str) -> None:
    error = await failure(getattr(fleet.api, method)(ask(adapter_id="ghost")))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND")
    assert error.details() == "adapter 'ghost' is not known"
    assert fleet.store.asked == [adapter_store_pb2.GetAdapterRequest(tenant="default", adapter_id="ghost")]
    assert fleet.scheduler.received.empty()


async def test_an_adapter_of_another_tenant_is_not_found_in_the_same_words(fleet: Fleet) -> None:
    theirs = adapter("ghost", tenant="other", sequence=3)
    fleet.store.adapters.append(theirs)
    fleet.store.announce(Change(sequence=3, put=theirs), Change(sequence=4, put=adapter("mark", sequence=4)))
    await listed(fleet, ["", "alpha", "mark", "zebra"])
    error = await failure(fleet.api.Generate(ask(adapter_id="ghost")))
    assert error.details() == "adapter 'ghost' is not known"


async def test_an_adapter_that_the_watch_has_not_told_of_is_found_by_asking(fleet: Fleet) -> None:
    fleet.store.adapters.append(adapter("fresh", sequence=3))
    call = fleet.api.GenerateStream(ask(adapter_id="fresh"))
    assert (await fleet.scheduler.submitted()).adapter_version == VERSION
    call.cancel()


async def test_another_version_than_the_current_is_asked_for(fleet: Fleet) -> None:
    call = fleet.api.GenerateStream(ask(adapter_id="alpha", adapter_version="b" * 64))
    await fleet.scheduler.submitted()
    assert [request.adapter_version for request in fleet.store.asked] == ["b" * 64]
    call.cancel()


async def test_changes_are_followed(fleet: Fleet) -> None:
    await fleet.store.watches.get()
    moved = adapter("alpha", sequence=3)
    moved.adapter_version = "c" * 64
    removal = adapter_store_pb2.AdapterRemoval(tenant="default", adapter_id="zebra")
    fleet.store.announce(Change(sequence=3, put=moved), Change(sequence=4, removal=removal))
    await listed(fleet, ["", "alpha"])
    call = fleet.api.GenerateStream(ask(adapter_id="alpha"))
    assert (await fleet.scheduler.submitted()).adapter_version == "c" * 64
    call.cancel()


async def test_a_resync_replaces_everything_once_it_is_whole(fleet: Fleet) -> None:
    await fleet.store.watches.get()
    fleet.store.announce(Change(sequence=9, put=adapter("new")), resync=True)
    fleet.store.announce(Change(sequence=8, put=adapter("other")))
    fleet.store.announce(caught_up=True)
    seen = await names(fleet)
    while seen != ["", "new", "other"]:
        assert seen == ["", "alpha", "zebra"]
        seen = await names(fleet)


async def test_a_broken_watch_goes_on_where_it_stopped(fleet: Fleet) -> None:
    assert (await fleet.store.watches.get()).after_sequence == 0
    again = await restarted(fleet)
    again.adapters.append(adapter("mark", sequence=3))
    await again.start()
    assert (await again.watches.get()).after_sequence == 2
    await listed(fleet, ["", "alpha", "mark", "zebra"])


async def test_a_resync_that_breaks_is_not_taken_for_whole(fleet: Fleet) -> None:
    await fleet.store.watches.get()
    fleet.store.announce(Change(sequence=9, put=adapter("half")), resync=True)
    fleet.store.announce()
    again = await restarted(fleet)
    await again.start()
    assert (await again.watches.get()).after_sequence == 2
    assert await names(fleet) == ["", "alpha", "zebra"]


async def test_without_the_store_the_known_resolves_and_the_unknown_is_unavailable(fleet: Fleet) -> None:
    await fleet.store.stop()
    call = fleet.api.GenerateStream(ask(adapter_id="alpha"))
    assert (await fleet.scheduler.submitted()).adapter_id == "alpha"
    call.cancel()
    error = await failure(fleet.api.Generate(ask(adapter_id="ghost")))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.UNAVAILABLE, "ADAPTER_STORE_UNAVAILABLE")
    assert retry_seconds_of(error) == 1.0
    assert await names(fleet) == ["", "alpha", "zebra"]


async def restarted(fleet: Fleet) -> FakeStore:
    """A store at the address of the one that is stopped here; not started yet."""
    await fleet.store.stop()
    old, fleet.store = fleet.store, FakeStore()
    fleet.store.port = old.port
    return fleet.store


async def test_an_unknown_adapter_is_not_asked_for_again_for_a_second(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("gateway.directory.time", SimpleNamespace(monotonic=lambda: now[0]))
    for now[0] in (100.0, 100.5, 100.99):
        await failure(fleet.api.Generate(ask(adapter_id="ghost")))
    assert len(fleet.store.asked) == 1
    # The store has it now, and the watch does not tell.
    fleet.store.adapters.append(adapter("ghost", sequence=3))
    now[0] = 101.0
    call = fleet.api.GenerateStream(ask(adapter_id="ghost"))
    assert (await fleet.scheduler.submitted()).adapter_version == VERSION
    assert len(fleet.store.asked) == 2
    call.cancel()


async def test_what_became_known_since_then_is_found(fleet: Fleet) -> None:
    await failure(fleet.api.Generate(ask(adapter_id="fresh")))
    found = adapter("fresh", sequence=3)
    fleet.store.announce(Change(sequence=3, put=found))
    await listed(fleet, ["", "alpha", "fresh", "zebra"])
    call = fleet.api.GenerateStream(ask(adapter_id="fresh"))
    await fleet.scheduler.submitted()
    call.cancel()


async def test_an_upload_is_read_by_who_wrote_it_before_the_watch_tells(fleet: Fleet) -> None:
    await failure(fleet.api.Generate(ask(adapter_id="new")))
    header = adapter_store_pb2.UploadHeader(adapter_id="new")
    await fleet.store_api.UploadAdapter(iter([adapter_store_pb2.UploadAdapterRequest(header=header)]))
    call = fleet.api.GenerateStream(ask(adapter_id="new"))
    await fleet.scheduler.submitted()
    call.cancel()


async def test_a_deleted_adapter_is_gone_before_the_watch_tells(fleet: Fleet) -> None:
    await fleet.store_api.DeleteAdapter(adapter_store_pb2.DeleteAdapterRequest(adapter_id="alpha"))
    assert await names(fleet) == ["", "zebra"]


async def test_older_news_does_not_undo_an_answer(fleet: Fleet) -> None:
    header = adapter_store_pb2.UploadHeader(adapter_id="new")
    await fleet.store_api.UploadAdapter(iter([adapter_store_pb2.UploadAdapterRequest(header=header)]))
    removal = adapter_store_pb2.AdapterRemoval(tenant="default", adapter_id="new")
    fleet.store.announce(Change(sequence=0, removal=removal), Change(sequence=9, put=adapter("zzz", sequence=9)))
    await listed(fleet, ["", "alpha", "new", "zebra", "zzz"])


async def test_many_who_ask_at_once_ask_the_store_once(fleet: Fleet) -> None:
    fleet.store.adapters.append(adapter("fresh", sequence=3))
    calls = [fleet.api.GenerateStream(ask(adapter_id="fresh")) for _ in range(10)]
    for _ in calls:
        await fleet.scheduler.submitted()
    assert len(fleet.store.asked) == 1
    for call in calls:
        call.cancel()
