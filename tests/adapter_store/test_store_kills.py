"""kill -9 at every failpoint of an upload, then a restart: nothing half-published, nothing acknowledged lost."""

import asyncio
import hashlib
import os
import shutil
import sys
from pathlib import Path

import pytest
import pytest_asyncio

import adapter_store
from adapter_store.config import StoreConfig
from adapter_store.failpoints import PLACES, Place, failpoint
from adapter_store.service import StoreService
from common.channel import connect
from common.errors import LoraplexError
from loraplex.v1 import adapter_store_pb2 as pb
from tests.adapter_store.conftest import StartStore
from tests.adapter_store.crafted import make_files
from tests.adapter_store.fakes import StoreClient
from tests.adapter_store.redis_server import PATIENT_SECONDS, RedisServer

ROOT = Path(adapter_store.__file__).parent.parent
KEPT, MOVED, NEW = "kept", "moved", "new"
# From here on the change is on disk, so it must be there although nobody was told.
DURABLE: tuple[Place, ...] = ("after-journal", "after-metadata")

Options = dict[str, str | float]


async def upload(service: StoreService, adapter_id: str, seed: int) -> pb.Adapter:
    async with connect(service.server.address) as channel:
        return (await StoreClient(channel).upload(adapter_id, make_files(seed), replace=True)).adapter


async def upload_into_a_kill(data_dir: Path, place: Place, adapter_id: str, options: Options) -> None:
    """Starts a store that dies at `place`, and uploads until it does."""
    command = [sys.executable, "-m", "adapter_store", "--data-dir", str(data_dir)]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    environment = {**os.environ, "LORAPLEX_FAILPOINT": place}
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, env=environment, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    address = (await process.stdout.readline()).decode().split("grpc=")[1].split()[0]
    async with connect(address) as channel:
        with pytest.raises(LoraplexError):
            await StoreClient(channel).upload(adapter_id, make_files(2), replace=True)
    assert await process.wait() == -9


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def acknowledged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A volume with two acknowledged uploads."""
    volume = tmp_path_factory.mktemp("acknowledged") / "store"
    service = StoreService(StoreConfig(data_dir=volume, drain_seconds=1.0))
    await service.start()
    await upload(service, KEPT, 0)
    await upload(service, MOVED, 1)
    await service.stop()
    return volume


def files_in_staging(data_dir: Path) -> list[Path]:
    return [path for staging in data_dir.glob("**/staging") for path in staging.iterdir()]


def lose_index(data_dir: Path) -> None:
    for file in data_dir.glob("adapters.db*"):
        file.unlink()


async def assert_whole(client: StoreClient, adapter_id: str) -> str:
    """The id's version, all of whose bytes are there."""
    adapter = await client.get(adapter_id)
    fetched = await client.fetch(adapter.adapter_version)
    assert fetched.layout.sha256 == hashlib.sha256(fetched.data.tobytes()).hexdigest()
    return adapter.adapter_version


@pytest.mark.parametrize(("registry", "adapter_id"), [("sqlite", NEW), ("sqlite", MOVED), ("redis", MOVED)])
@pytest.mark.parametrize("place", PLACES)
async def test_a_store_killed_at_a_failpoint_loses_nothing(
    start_store: StartStore,
    redis_server: RedisServer,
    redis_prefix: str,
    data_dir: Path,
    acknowledged: Path,
    place: Place,
    registry: str,
    adapter_id: str,
) -> None:
    # What Redis has decided, the next store writes down.
    done = place in DURABLE or (registry, place) == ("redis", "before-journal")
    options: Options = (
        {"redis": redis_server.url, "redis_prefix": redis_prefix, "redis_timeout_seconds": PATIENT_SECONDS}
        if registry == "redis"
        else {}
    )
    shutil.copytree(acknowledged, data_dir)
    await upload_into_a_kill(data_dir, place, adapter_id, options)
    service = await start_store(**options)
    assert files_in_staging(data_dir) == []
    async with connect(service.server.address) as channel:
        client = StoreClient(channel)
        listed = {adapter.adapter_id: adapter.adapter_version for adapter in (await client.page()).adapters}
        assert {KEPT, MOVED} <= listed.keys() <= {KEPT, MOVED, NEW}
        for found in listed:
            assert await assert_whole(client, found) == listed[found]
            # The manifest is the truth: what is served is in it, whoever decided it.
            assert (data_dir / "journal" / f"{(await client.get(found)).sequence:020d}").exists()
        again = await client.upload(adapter_id, make_files(2), replace=True)
        assert again.created == (not done)
        assert await assert_whole(client, adapter_id) == again.adapter.adapter_version


@pytest.mark.parametrize("index", ["kept", "lost"])
async def test_what_a_kill_left_in_objects_is_swept(
    start_store: StartStore, data_dir: Path, acknowledged: Path, index: str
) -> None:
    shutil.copytree(acknowledged, data_dir)
    before = {path.name for path in (data_dir / "objects").iterdir()}
    await upload_into_a_kill(data_dir, "before-metadata", NEW, {})
    assert len(list((data_dir / "objects").iterdir())) == 3
    if index == "lost":
        lose_index(data_dir)
    await start_store()
    assert {path.name for path in (data_dir / "objects").iterdir()} == before


def test_an_unarmed_failpoint_does_nothing() -> None:
    for place in PLACES:
        failpoint(place)
