"""What a store finds when it starts, and what it leaves when things go wrong."""

import asyncio
import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapter_store.blobs import CONFIG, WEIGHTS, Blobs, DiskLimits, StagedAdapter
from adapter_store.disk import create, disk_errors, open_existing, write_all
from adapter_store.names import is_digest
from adapter_store.service import StoreService
from common.channel import connect
from common.errors import InvalidArgument, NotFound, ResourceExhausted
from loraplex.v1 import adapter_store_pb2 as pb
from tests.adapter_store.conftest import StartStore
from tests.adapter_store.crafted import make_files, tensor_name
from tests.adapter_store.fakes import TENANT, StoreClient

LIMITS = DiskLimits({CONFIG: 100, WEIGHTS: 1000})


async def test_leftovers_of_a_crash_are_removed_from_staging(start_store: StartStore, data_dir: Path) -> None:
    leftover = data_dir / "staging" / "crashed"
    leftover.mkdir(parents=True)
    (leftover / WEIGHTS).write_bytes(b"half")
    (data_dir / "staging" / "file").write_bytes(b"")
    (data_dir / "staging" / "link").symlink_to(data_dir)
    await start_store()
    assert list((data_dir / "staging").iterdir()) == []


async def test_a_second_store_on_the_same_folder_is_refused(start_store: StartStore) -> None:
    await start_store()
    with pytest.raises(OSError, match="another adapter store uses"):
        await start_store()


async def test_an_index_that_is_no_database_is_made_again(start_store: StartStore, data_dir: Path) -> None:
    service = await start_store()
    async with client_of(service) as client:
        adapter = (await client.upload("a", make_files())).adapter
    await service.stop()
    (data_dir / "adapters.db").write_bytes(b"not a database" * 100)
    async with client_of(await start_store()) as client:
        assert await client.get("a") == adapter
        # Whoever watched before may have heard of anything.
        assert (await anext(client.watch(after=adapter.sequence))).resync


async def test_an_index_that_cannot_be_opened_is_said(start_store: StartStore, data_dir: Path) -> None:
    (data_dir / "adapters.db").mkdir(parents=True)
    with pytest.raises(OSError, match=r"cannot open .*adapters\.db"):
        await start_store()


async def test_a_restart_keeps_adapters_and_sequence(start_store: StartStore) -> None:
    service = await start_store()
    async with client_of(service) as client:
        first = (await client.upload("a", make_files())).adapter
        await client.upload("gone", make_files(1))
        await client.delete("gone")
    await service.stop()
    again = await start_store()
    async with client_of(again) as client:
        assert await client.get("a") == first
        assert (await client.fetch(first.adapter_version)).data.size > 0
        with pytest.raises(NotFound):
            await client.get("gone")
        assert (await client.upload("b", make_files(2))).adapter.sequence == 4


async def test_a_version_published_by_nobody_is_swept_at_the_start(start_store: StartStore, data_dir: Path) -> None:
    service = await start_store()
    async with client_of(service) as client:
        await client.upload("a", make_files())
    store, registry = service.store, service.store.registry
    alias = await registry.get(TENANT, "a")
    assert alias is not None
    await registry.remove(TENANT, "a", expected=None, now=0.0)
    await registry.release(1.0)
    assert await registry.garbage() == [alias.version.digest]
    await store.settle()
    await service.stop()
    await start_store()
    assert list((data_dir / "objects").iterdir()) == []


async def test_a_client_that_goes_away_leaves_nothing(
    start_store: StartStore, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, began = await start_store(), asyncio.Event()
    stage = service.store.stage

    def announced_stage() -> StagedAdapter:
        began.set()
        return stage()

    monkeypatch.setattr(service.store, "stage", announced_stage)
    async with client_of(service) as client:
        call = client.stub.UploadAdapter()
        await call.write(pb.UploadAdapterRequest(header=pb.UploadHeader(tenant=TENANT, adapter_id="a")))
        await began.wait()
        call.cancel()
    await service.stop()
    assert list((data_dir / "staging").iterdir()) == []
    assert list((data_dir / "objects").iterdir()) == []


async def test_objects_are_readable_by_their_owner_only(start_store: StartStore, data_dir: Path) -> None:
    service = await start_store()
    async with client_of(service) as client:
        await client.upload("a", make_files())
    (folder,) = (data_dir / "objects").iterdir()
    assert is_digest(folder.name)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o400}
    assert sorted(path.name for path in folder.iterdir()) == [
        CONFIG,
        WEIGHTS,
        "manifest.json",
        "packed.float32",
        "packed.float32.layout",
    ]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_resource_exhausted(number: int) -> None:
    with pytest.raises(ResourceExhausted, match="disk is full"), disk_errors():
        raise OSError(number, "full")


def test_other_failures_of_the_disk_are_not_hidden() -> None:
    with pytest.raises(PermissionError), disk_errors():
        raise PermissionError(errno.EACCES, "no")


def test_a_short_write_goes_on(tmp_path: Path) -> None:
    class Stubborn(FileIO):
        def write(self, data: Any) -> int:
            return super().write(data[:3])

    with Stubborn(tmp_path / "file", "w") as file:
        write_all(file, b"0123456789")
    assert (tmp_path / "file").read_bytes() == b"0123456789"


@pytest.mark.parametrize("kind", ["file", "link", "dangling-link"])
def test_a_new_file_never_takes_an_existing_name(tmp_path: Path, kind: str) -> None:
    path, other = tmp_path / "file", tmp_path / "other"
    if kind == "file":
        path.touch()
    else:
        path.symlink_to(other)
    if kind == "link":
        other.touch()
    with pytest.raises(FileExistsError):
        create(path)


def test_a_link_is_never_followed(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with pytest.raises(OSError) as caught:
        open_existing(tmp_path / "link")
    assert caught.value.errno == errno.ELOOP


def test_a_discarded_upload_takes_no_more(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path, LIMITS)
    blobs.start()
    staged = blobs.stage()
    staged.append(CONFIG, b"{}")
    staged.discard()
    with pytest.raises(ValueError, match="discarded"):
        staged.append(CONFIG, b"{}")
    assert not staged.directory.exists()
    blobs.close()


def test_only_a_digest_names_an_object(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a digest"):
        Blobs(tmp_path, LIMITS).open("../lock", CONFIG)


def test_deleting_what_is_gone_is_fine(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path, LIMITS)
    blobs.start()
    blobs.delete("0" * 64)
    blobs.close()


async def test_without_a_model_any_shape_is_taken(start_store: StartStore) -> None:
    service = await start_store()
    tensors = {
        tensor_name(1, "q_proj", "A"): np.ones((3, 7), np.float32),
        tensor_name(1, "q_proj", "B"): np.ones((5, 3), np.float32),
    }
    async with client_of(service) as client:
        response = await client.upload("a", make_files(tensors=tensors))
    assert response.adapter.modules[0].delta_norm == pytest.approx(2 * 3 * np.sqrt(35))


async def test_a_file_over_the_limit_is_refused_while_it_comes(start_store: StartStore) -> None:
    service = await start_store(max_adapter_bytes=1000)
    assert len(make_files()[WEIGHTS]) > 1000
    async with client_of(service) as client:
        with pytest.raises(InvalidArgument, match=r"larger than the limit of 1000 bytes"):
            await client.upload("a", make_files())


@asynccontextmanager
async def client_of(service: StoreService) -> AsyncIterator[StoreClient]:
    channel = connect(service.server.address)
    try:
        yield StoreClient(channel)
    finally:
        await channel.close()
