"""Bytes of an adapter live as long as somebody holds it, and for the grace."""

import json
from pathlib import Path

import pytest

from adapter_store.blobs import CONFIG, WEIGHTS
from adapter_store.manifest import MANIFEST
from adapter_store.service import StoreService
from adapter_store.store import SWEEP_SECONDS
from common.errors import AlreadyExists, InvalidArgument, NotFound
from tests.adapter_store.conftest import GRACE_SECONDS
from tests.adapter_store.crafted import make_files
from tests.adapter_store.fakes import FakeClock, StoreClient


async def put(client: StoreClient, adapter_id: str, seed: int = 0, **options: str) -> str:
    return (await client.upload(adapter_id, make_files(seed), replace=True, **options)).adapter.adapter_version


def objects(data_dir: Path) -> set[str]:
    return {path.name for path in (data_dir / "objects").iterdir()}


async def test_the_same_bytes_under_two_ids_are_stored_once(client: StoreClient, data_dir: Path) -> None:
    assert await put(client, "a") == await put(client, "b")
    assert len(objects(data_dir)) == 1


async def test_no_upload_leaves_anything_in_staging(client: StoreClient, data_dir: Path) -> None:
    files = make_files()
    await client.upload("a", files)
    await client.upload("a", files)
    with pytest.raises(InvalidArgument):
        await client.upload("b", {CONFIG: json.dumps({}).encode(), WEIGHTS: files[WEIGHTS]})
    assert list((data_dir / "staging").iterdir()) == []
    assert len(list((data_dir / "objects").iterdir())) == 1


async def test_deleted_bytes_are_served_until_the_grace_is_over(
    client: StoreClient, service: StoreService, clock: FakeClock, data_dir: Path
) -> None:
    version = await put(client, "a")
    await client.delete("a")
    clock.seconds += GRACE_SECONDS - 1
    await service.store.sweep()
    assert (await client.fetch(version)).data.size > 0
    clock.seconds += 1
    await service.store.sweep()
    with pytest.raises(NotFound):
        await client.fetch(version)
    assert objects(data_dir) == set()


async def test_the_sweep_runs_by_itself(client: StoreClient, clock: FakeClock, data_dir: Path) -> None:
    await put(client, "a")
    await client.delete("a")
    clock.advance(GRACE_SECONDS + SWEEP_SECONDS)
    await clock.sleeping.wait()
    assert objects(data_dir) == set()


async def test_bytes_of_another_tenants_id_stay(
    client: StoreClient, service: StoreService, clock: FakeClock, data_dir: Path
) -> None:
    version = await put(client, "a")
    await put(client, "b", tenant="other")
    await client.delete("a")
    clock.seconds += 2 * GRACE_SECONDS
    await service.store.sweep()
    assert objects(data_dir) == {version}
    with pytest.raises(NotFound):
        await client.fetch(version)
    assert (await client.fetch(version, tenant="other")).data.size > 0


async def test_an_upload_within_the_grace_saves_the_bytes(
    client: StoreClient, service: StoreService, clock: FakeClock
) -> None:
    version = await put(client, "a")
    await client.delete("a")
    assert (await client.upload("a", make_files())).created
    clock.seconds += 2 * GRACE_SECONDS
    await service.store.sweep()
    assert (await client.fetch(version)).data.size > 0


async def test_the_former_version_of_a_moved_id_goes_after_the_grace(
    client: StoreClient, service: StoreService, clock: FakeClock, data_dir: Path
) -> None:
    await put(client, "a", 0)
    second = await put(client, "a", 1)
    clock.seconds += GRACE_SECONDS
    await service.store.sweep()
    assert objects(data_dir) == {second}


async def test_an_object_that_nobody_came_to_own_is_swept(
    client: StoreClient, service: StoreService, data_dir: Path
) -> None:
    first = await put(client, "a", 0)
    with pytest.raises(AlreadyExists):
        await client.upload("a", make_files(1))
    await service.store.sweep()
    assert objects(data_dir) == {first}


async def test_gauges_follow_the_store(client: StoreClient, service: StoreService, data_dir: Path) -> None:
    version = await put(client, "a")
    await put(client, "b")
    registry = service.server.registry
    stored_bytes = sum(
        file.stat().st_size for file in (data_dir / "objects" / version).iterdir() if file.name != MANIFEST
    )
    assert registry.get_sample_value("loraplex_store_adapters") == 2
    assert registry.get_sample_value("loraplex_store_bytes") == stored_bytes
    assert (registry.get_sample_value("loraplex_store_disk_free_bytes") or 0) > 0
