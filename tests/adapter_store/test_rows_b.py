"""Faults B 15 to 18: the store away, damaged bytes, swapped files, a full disk. (B 11 to 14: test_store_redis.py.)"""

import asyncio
import hashlib
import resource
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

import adapter_store
from adapter_store.packed_reader import PackedReader
from adapter_store.service import StoreService
from common.channel import connect
from common.checksum import Checksum
from common.errors import DataLoss, LoraplexError, ResourceExhausted
from common.wire import layout_from_proto
from gpu_worker.blob_cache import BlobCache
from gpu_worker.fetcher import Fetcher
from gpu_worker.host_storage import MappedFiles, WrongBytesError
from gpu_worker.loader import LoadDone, Loader
from gpu_worker.memory.geometry import PageGeometry
from gpu_worker.memory.pool import PagePool
from gpu_worker.metrics import WorkerMetrics
from loraplex.v1 import engine_pb2, types_pb2
from tests.adapter_store.conftest import StartStore
from tests.adapter_store.crafted import make_files, make_tensors
from tests.adapter_store.fakes import TENANT, StoreClient

ROOT = Path(adapter_store.__file__).parent.parent
SWAPS = 10_000


async def put(client: StoreClient, adapter_id: str, seed: int = 0) -> str:
    return (await client.upload(adapter_id, make_files(seed), replace=True)).adapter.adapter_version


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def flip(path: Path, place: int) -> None:
    path.chmod(0o600)
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


async def test_b15_a_cold_adapter_of_a_store_that_is_away_fails_fast_and_once(
    client: StoreClient, service: StoreService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = await put(client, "a")
    replies: asyncio.Queue[engine_pb2.EngineCommand] = asyncio.Queue()
    metrics = WorkerMetrics(CollectorRegistry())
    cache = BlobCache(tmp_path / "cache", 2**30)
    fetcher = Fetcher(service.server.address, cache, metrics, replies.put_nowait)
    needed = engine_pb2.AdapterNeeded(tenant=TENANT, adapter_version=version)
    fetcher.fetch(needed)
    assert (await replies.get()).HasField("adapter_fetched")
    await service.stop()
    asked, ask = list[str](), fetcher._ask

    async def seen_ask(needed: engine_pb2.AdapterNeeded) -> engine_pb2.EngineCommand:
        asked.append(needed.adapter_version)
        return await ask(needed)

    monkeypatch.setattr(fetcher, "_ask", seen_ask)
    for _ in range(500):
        fetcher.fetch(needed)
    # Ten times the second of the row, which `make bench-store` shows: the machine may be busy.
    failed = (await asyncio.wait_for(replies.get(), timeout=10)).adapter_fetch_failed
    assert failed.error.reason == "ADAPTER_STORE_UNAVAILABLE"
    assert asked == [version]
    assert replies.empty()
    await fetcher.close()
    cache.close()


async def fetched_by_a_worker(service: StoreService, tmp_path: Path, version: str, volume: Path) -> Path:
    """Where a worker that sees `volume` reads the adapter."""
    replies: asyncio.Queue[engine_pb2.EngineCommand] = asyncio.Queue()
    metrics = WorkerMetrics(CollectorRegistry())
    cache = BlobCache(tmp_path / "cache", 2**30)
    fetcher = Fetcher(service.server.address, cache, metrics, replies.put_nowait, volume)
    fetcher.fetch(engine_pb2.AdapterNeeded(tenant=TENANT, adapter_version=version))
    fetched = (await asyncio.wait_for(replies.get(), timeout=100)).adapter_fetched
    await fetcher.close()
    cache.close()
    path = Path(fetched.path)
    assert fetched.layout.sha256 == sha256_of(path)
    return path


async def test_a_worker_on_the_same_volume_reads_the_file_itself(
    client: StoreClient, service: StoreService, data_dir: Path, tmp_path: Path
) -> None:
    version = await put(client, "a")
    path = await fetched_by_a_worker(service, tmp_path, version, data_dir)
    assert path == data_dir / "objects" / version / "packed.float32"
    assert list((tmp_path / "cache").glob("*.packed")) == []


async def test_a_worker_that_does_not_see_the_volume_fetches(
    client: StoreClient, service: StoreService, tmp_path: Path
) -> None:
    path = await fetched_by_a_worker(service, tmp_path, await put(client, "a"), tmp_path / "nowhere")
    assert path.parent == tmp_path / "cache"


async def test_b17_a_link_on_the_volume_is_not_followed(
    client: StoreClient, service: StoreService, data_dir: Path, tmp_path: Path
) -> None:
    version = await put(client, "a")
    volume = tmp_path / "volume"
    (volume / "objects" / version).mkdir(parents=True)
    (volume / "objects" / version / "packed.float32").symlink_to(data_dir / "objects" / version / "packed.float32")
    assert (await fetched_by_a_worker(service, tmp_path, version, volume)).parent == tmp_path / "cache"


@pytest.mark.parametrize("place", [0, -1], ids=["first-byte", "last-byte"])
async def test_b16_a_bit_flip_is_never_served(
    client: StoreClient, service: StoreService, data_dir: Path, place: int
) -> None:
    version, other = await put(client, "a"), await put(client, "b", 1)
    flip(data_dir / "objects" / version / "packed.float32", place)
    for _ in range(2):
        with pytest.raises(DataLoss) as caught:
            await client.fetch(version)
        assert caught.value.reason == "ADAPTER_DAMAGED"
    assert service.server.registry.get_sample_value("loraplex_store_verify_failures_total", {"stage": "read"}) == 1
    assert (await client.fetch(other)).data.size > 0


async def test_b16_the_last_chunk_of_damaged_bytes_is_held_back(client: StoreClient, data_dir: Path) -> None:
    version = await put(client, "a")
    flip(data_dir / "objects" / version / "packed.float32", 0)
    chunks = 0
    with pytest.raises(LoraplexError):
        chunks = len((await client.fetch(version)).chunks)
    assert chunks == 0


async def test_b16_another_upload_of_the_bytes_mends_them(client: StoreClient, data_dir: Path) -> None:
    version = await put(client, "a")
    flip(data_dir / "objects" / version / "packed.float32", 9)
    with pytest.raises(DataLoss):
        await client.fetch(version)
    assert await put(client, "a") == version
    fetched = await client.fetch(version)
    assert fetched.layout.sha256 == hashlib.sha256(fetched.data.tobytes()).hexdigest()


@pytest.mark.parametrize("spoil", ["cut", "missing", "layout"])
async def test_b16_another_upload_mends_what_is_not_there(client: StoreClient, data_dir: Path, spoil: str) -> None:
    version = await put(client, "a")
    folder = data_dir / "objects" / version
    if spoil == "cut":
        flip(folder / "packed.float32", 0)
        (folder / "packed.float32").write_bytes((folder / "packed.float32").read_bytes()[:-1])
    else:
        (folder / ("packed.float32" if spoil == "missing" else "packed.float32.layout")).unlink()
    with pytest.raises(DataLoss):
        await client.fetch(version)
    assert await put(client, "a") == version
    fetched = await client.fetch(version)
    assert fetched.layout.sha256 == hashlib.sha256(fetched.data.tobytes()).hexdigest()


async def test_b16_bytes_older_than_their_blake3_are_verified_too(client: StoreClient, data_dir: Path) -> None:
    version = await put(client, "a")
    file = data_dir / "objects" / version / "packed.float32.layout"
    layout = types_pb2.PackedLayout.FromString(file.read_bytes())
    layout.ClearField("blake3")
    file.chmod(0o600)
    file.write_bytes(layout.SerializeToString())
    assert (await client.fetch(version)).layout == layout
    flip(data_dir / "objects" / version / "packed.float32", 9)
    with pytest.raises(DataLoss):
        await client.fetch(version)


@contextmanager
def swapping(file: Path, true_bytes: bytes, folder: Path) -> Iterator[None]:
    """Other bytes, then a link to them, then the true ones; each put there by a rename, over and over."""
    stop, other_bytes = threading.Event(), bytes(len(true_bytes))

    def swap() -> None:
        (folder / "other").write_bytes(other_bytes)
        while not stop.is_set():
            (folder / "bad").write_bytes(other_bytes)
            (folder / "bad").rename(file)
            (folder / "link").symlink_to(folder / "other")
            (folder / "link").rename(file)
            (folder / "good").write_bytes(true_bytes)
            (folder / "good").rename(file)

    swapper = threading.Thread(target=swap)
    swapper.start()
    try:
        yield
    finally:
        stop.set()
        swapper.join()


async def test_b17_c05_a_file_swapped_under_a_reader_is_whole_or_refused(
    client: StoreClient, service: StoreService, data_dir: Path, tmp_path: Path
) -> None:
    version = await put(client, "a")
    folder, held = data_dir / "objects" / version, await service.store.registry.held(TENANT, version)
    assert held is not None
    true_bytes = (folder / "packed.float32").read_bytes()
    good = 0
    with swapping(folder / "packed.float32", true_bytes, tmp_path):
        for _ in range(SWAPS):
            try:
                reader = PackedReader.open(folder, held, "float32")
            except DataLoss:
                continue
            data = reader.read(0, len(true_bytes))
            reader.hash(0, data)
            if reader.is_intact():
                assert data == true_bytes
                good += 1
            reader.close()
    assert 0 < good < SWAPS


async def test_b17_c05_a_file_swapped_under_a_worker_is_whole_or_refused(
    client: StoreClient, data_dir: Path, tmp_path: Path
) -> None:
    version = await put(client, "a")
    file = data_dir / "objects" / version / "packed.float32"
    layout, true_bytes = layout_from_proto((await client.fetch(version)).layout), file.read_bytes()
    geometry = PageGeometry(num_layers=1, num_kv_heads=1, head_dim=32, element_bytes=4, page_size=4)
    pages = list(range(geometry.pages_for_bytes(len(true_bytes))))
    pool, done = PagePool(geometry, len(pages), "cpu"), threading.Event()
    wrong: list[bool] = []

    def next_load(load: LoadDone) -> None:
        # The pages are ours until the next load is asked for.
        wrong.append(not load.failure and pool.bytes.numpy().tobytes()[: len(true_bytes)] != true_bytes)
        failures.append(load.failure)
        if len(wrong) == SWAPS:
            done.set()
        else:
            start_load()

    def start_load() -> None:
        try:
            blob = MappedFiles().open(file, layout)
        except WrongBytesError as error:
            next_load(LoadDone(version, str(error), 0.0))
        else:
            loader.load(version, blob, pages)

    failures: list[str] = []
    loader = Loader(pool, next_load)
    with swapping(file, true_bytes, tmp_path):
        start_load()
        await asyncio.to_thread(done.wait)
    loader.stop()
    assert not any(wrong)
    assert 0 < sum(map(bool, failures)) < SWAPS


async def test_b17_c05_a_file_overwritten_while_a_worker_copies_it_is_refused(
    client: StoreClient, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place, so that even the mapping changes: only bytes verified where they were copied to are the true ones."""
    version = await put(client, "a")
    layout = layout_from_proto((await client.fetch(version)).layout)
    file = tmp_path / "packed"
    file.write_bytes((data_dir / "objects" / version / "packed.float32").read_bytes())
    geometry = PageGeometry(num_layers=1, num_kv_heads=1, head_dim=32, element_bytes=4, page_size=4)
    pages = list(range(geometry.pages_for_bytes(layout.total_bytes)))
    assert len(pages) > 1
    pool, update = PagePool(geometry, len(pages), "cpu"), Checksum.update

    def update_and_overwrite(checksum: Checksum, data: Any) -> None:
        update(checksum, data)
        with file.open("r+b") as opened:
            opened.write(bytes(layout.total_bytes))

    monkeypatch.setattr(Checksum, "update", update_and_overwrite)
    # Page by page, as a large adapter is copied group by group where nothing is compiled.
    monkeypatch.setattr("kernels.cpu.pages.library", lambda: None)
    monkeypatch.setattr("gpu_worker.memory.pool._GROUP_BYTES", 1)
    blob = MappedFiles().open(file, layout)
    with pytest.raises(WrongBytesError):
        blob.copy_to(pool, pages)


@pytest.fixture
async def limited_store(tmp_path: Path) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """A store process whose log file is already larger than the limit that a test sets."""
    with (tmp_path / "log").open("ab") as log:
        log.write(b"x" * 300_000)
        log.flush()
        command = [sys.executable, "-m", "adapter_store", "--data-dir", str(tmp_path / "store")]
        process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=log)
    assert process.stdout is not None
    yield process, (await process.stdout.readline()).decode().split("grpc=")[1].split()[0]
    process.kill()
    await process.wait()


async def test_b18_a_disk_full_for_files_and_for_the_log(
    limited_store: tuple[asyncio.subprocess.Process, str], tmp_path: Path
) -> None:
    process, address = limited_store
    async with connect(address) as channel:
        client = StoreClient(channel)
        version = await put(client, "a")
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (200_000, 200_000))
        large = make_files(tensors=make_tensors(lora_rank=500), r=500)
        with pytest.raises(ResourceExhausted) as caught:
            await client.upload("large", large)
        assert caught.value.reason == "DISK_FULL"
        assert (await client.fetch(version)).data.size > 0
        assert list((tmp_path / "store" / "staging").iterdir()) == []
    assert process.returncode is None


async def test_b18_the_reserve_of_the_disk_is_not_used(start_store: StartStore, data_dir: Path) -> None:
    service = await start_store(disk_reserve_bytes=2**60)
    async with connect(service.server.address) as channel:
        with pytest.raises(ResourceExhausted) as caught:
            await put(StoreClient(channel), "a")
    assert caught.value.reason == "DISK_RESERVE"
    assert list((data_dir / "staging").iterdir()) == []


@pytest.mark.parametrize(
    ("option", "limit", "reason"),
    [("tenant_max_adapters", 2, "QUOTA_ADAPTERS"), ("tenant_max_bytes", 18_000, "QUOTA_BYTES")],
)
async def test_a_tenant_has_a_quota(start_store: StartStore, option: str, limit: int, reason: str) -> None:
    service = await start_store(**{option: limit})
    async with connect(service.server.address) as channel:
        client = StoreClient(channel)
        await put(client, "a")
        await put(client, "b", 1)
        with pytest.raises(ResourceExhausted) as caught:
            await put(client, "c", 2)
        assert caught.value.reason == reason
        assert await put(client, "a", 9)
        assert await client.upload("a", make_files(), tenant="other")
