"""Store → host: verified, cached, each digest once, and nothing half left behind."""

import asyncio
import contextlib
import errno
import hashlib
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from prometheus_client import CollectorRegistry

from common.wire import layout_to_proto
from gpu_worker import download, fetcher
from gpu_worker.blob_cache import BlobCache
from gpu_worker.fetcher import Fetcher
from gpu_worker.metrics import WorkerMetrics
from loraplex.v1 import engine_pb2
from tests.gpu_worker.neighbours import CHUNK_BYTES, FakeStore, serving
from tests.gpu_worker.tiny_model import TinyAdapter

TIMEOUT_SECONDS = 100.0


class Answers:
    """A fetcher and what it told the engine."""

    def __init__(self, address: str, cache: Path, limit_bytes: int = 2**30) -> None:
        self._queue: asyncio.Queue[engine_pb2.EngineCommand] = asyncio.Queue()
        self.registry = CollectorRegistry()
        self.cache = BlobCache(cache, limit_bytes)
        self.fetcher = Fetcher(address, self.cache, WorkerMetrics(self.registry), self._queue.put_nowait)

    def ask(self, adapter_version: str) -> None:
        self.fetcher.fetch(engine_pb2.AdapterNeeded(tenant="default", adapter_version=adapter_version))

    async def next(self) -> engine_pb2.EngineCommand:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            return await self._queue.get()

    async def fetch(self, adapter_version: str) -> engine_pb2.EngineCommand:
        self.ask(adapter_version)
        return await self.next()


@contextlib.asynccontextmanager
async def asking(address: str, cache: Path, limit_bytes: int = 2**30) -> AsyncIterator[Answers]:
    answers = Answers(address, cache, limit_bytes)
    try:
        yield answers
    finally:
        await answers.fetcher.close()
        answers.cache.close()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
async def store(tiny_adapters: list[TinyAdapter]) -> FakeStore:
    store = FakeStore()
    store.adapters = {adapter.version: adapter for adapter in tiny_adapters}
    return store


@pytest.fixture
async def answers(store: FakeStore, cache: Path) -> AsyncIterator[Answers]:
    async with serving(store) as address, asking(address, cache) as answers:
        yield answers


def read(path: str) -> bytes:
    return Path(path).read_bytes()


def damage(path: str) -> None:
    Path(path).write_bytes(b"damaged")


def files(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.name != "lock")


async def test_a_fetched_adapter_is_in_a_file(answers: Answers, store: FakeStore) -> None:
    fetched = (await answers.fetch("rank-8")).adapter_fetched
    assert read(fetched.path) == store.adapters["rank-8"].content


async def test_its_layout_comes_along(answers: Answers, store: FakeStore) -> None:
    fetched = (await answers.fetch("rank-8")).adapter_fetched
    assert fetched.layout == layout_to_proto(store.adapters["rank-8"].layout)


async def test_a_second_time_nothing_is_downloaded(answers: Answers, store: FakeStore) -> None:
    first = await answers.fetch("rank-8")
    # From here on a download would never end.
    store.go_on.clear()
    assert await answers.fetch("rank-8") == first


async def test_a_damaged_file_is_downloaded_anew(answers: Answers, store: FakeStore) -> None:
    path = (await answers.fetch("rank-8")).adapter_fetched.path
    damage(path)
    await answers.fetch("rank-8")
    assert read(path) == store.adapters["rank-8"].content


class TestWrongBytes:
    @pytest.fixture(autouse=True)
    def corrupt(self, store: FakeStore, tmp_path: Path) -> None:
        store.adapters["rank-8"] = store.adapters["rank-8"].corrupted(tmp_path)

    async def test_they_are_refused(self, answers: Answers) -> None:
        error = (await answers.fetch("rank-8")).adapter_fetch_failed.error
        assert (error.code, error.reason) == (grpc.StatusCode.DATA_LOSS.value[0], "ADAPTER_CORRUPT")

    async def test_they_leave_no_file(self, answers: Answers, cache: Path) -> None:
        await answers.fetch("rank-8")
        assert files(cache) == []

    async def test_they_are_counted(self, answers: Answers) -> None:
        await answers.fetch("rank-8")
        name, labels = "loraplex_adapter_load_failures_total", {"reason": "adapter_corrupt"}
        assert answers.registry.get_sample_value(name, labels) == 1


class TestTooFewBytes:
    @pytest.fixture(autouse=True)
    def cut(self, store: FakeStore, tmp_path: Path) -> None:
        store.adapters["rank-8"] = store.adapters["rank-8"].cut_short(tmp_path)

    async def test_they_are_refused_with_both_numbers(self, answers: Answers, store: FakeStore) -> None:
        error = (await answers.fetch("rank-8")).adapter_fetch_failed.error
        size = store.adapters["rank-8"].layout.total_bytes
        assert (error.code, error.reason) == (grpc.StatusCode.DATA_LOSS.value[0], "ADAPTER_CORRUPT")
        assert error.message.startswith(f"{size - 1} of {size} bytes came")

    async def test_they_are_nobody_elses_fault(self, answers: Answers) -> None:
        """The store is not taken for one that is away: who wants another adapter gets it at once."""
        await answers.fetch("rank-8")
        assert (await answers.fetch("rank-3")).HasField("adapter_fetched")

    async def test_they_leave_no_file(self, answers: Answers, cache: Path) -> None:
        await answers.fetch("rank-8")
        assert files(cache) == []


async def test_an_unknown_adapter_is_the_stores_word(answers: Answers) -> None:
    error = (await answers.fetch("nobody")).adapter_fetch_failed.error
    assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND.value[0], "ADAPTER_NOT_FOUND")


async def test_a_store_that_is_down_is_unavailable(cache: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        async with asking(address, cache) as answers:
            error = (await answers.fetch("rank-8")).adapter_fetch_failed.error
    assert error.code == grpc.StatusCode.UNAVAILABLE.value[0]
    assert error.retry_after_seconds > 0


async def test_a_cache_that_cannot_be_written_fails_the_adapter(
    answers: Answers, store: FakeStore, cache: Path
) -> None:
    # Not even root can write a file over a folder.
    (cache / f"{store.adapters['rank-8'].layout.sha256}.packed").mkdir()
    error = (await answers.fetch("rank-8")).adapter_fetch_failed.error
    assert error.reason == "CACHE_WRITE_FAILED"


async def test_two_versions_of_the_same_bytes_come_at_once(answers: Answers, store: FakeStore, cache: Path) -> None:
    """The same weights with another alpha: scaling is beside the bytes."""
    first = store.adapters["rank-8"]
    store.adapters["twin"] = replace(first, version="twin")
    store.go_on.clear()
    answers.ask("rank-8")
    answers.ask("twin")
    for _ in range(2):
        await store.started.get()
    store.go_on.set()
    both = [await answers.next(), await answers.next()]
    assert [command.WhichOneof("command") for command in both] == ["adapter_fetched"] * 2
    assert files(cache) == [f"{hashlib.sha256(first.content).hexdigest()}.packed"]


class TestBrokenTransfers:
    """Three chunks of a thousand bytes and a rest: what has come is not asked for again."""

    @pytest.fixture(autouse=True)
    def patience(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """However long a busy machine takes between two breaks."""
        monkeypatch.setattr(fetcher, "RETRY_SECONDS", TIMEOUT_SECONDS)

    async def test_it_goes_on_where_it_broke(self, answers: Answers, store: FakeStore) -> None:
        store.breaks = {("rank-8", 2)}
        fetched = (await answers.fetch("rank-8")).adapter_fetched
        assert read(fetched.path) == store.adapters["rank-8"].content
        assert store.offsets == [0, 2 * CHUNK_BYTES]

    async def test_a_stream_that_ends_too_early_is_asked_for_the_rest(self, answers: Answers, store: FakeStore) -> None:
        store.ends = {("rank-8", 2)}
        fetched = (await answers.fetch("rank-8")).adapter_fetched
        assert read(fetched.path) == store.adapters["rank-8"].content
        assert store.offsets == [0, 2 * CHUNK_BYTES]

    async def test_many_breaks_with_progress_between_them_are_borne(self, answers: Answers, store: FakeStore) -> None:
        store.breaks = {("rank-8", chunk) for chunk in range(1, 12)}
        fetched = (await answers.fetch("rank-8")).adapter_fetched
        assert read(fetched.path) == store.adapters["rank-8"].content

    async def test_bytes_that_changed_meanwhile_are_refused(
        self, answers: Answers, store: FakeStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.breaks = {("rank-8", 2)}
        answers.ask("rank-8")
        await store.started.get()
        store.adapters["rank-8"] = replace(store.adapters["rank-3"], version="rank-8")
        error = (await answers.next()).adapter_fetch_failed.error
        assert error.reason == "ADAPTER_CORRUPT"


async def test_a_bad_adapter_is_not_asked_for_again_at_once(answers: Answers, store: FakeStore, tmp_path: Path) -> None:
    store.adapters["rank-8"] = store.adapters["rank-8"].corrupted(tmp_path)
    first = (await answers.fetch("rank-8")).adapter_fetch_failed.error
    calls = len(store.offsets)
    second = (await answers.fetch("rank-8")).adapter_fetch_failed.error
    assert (second.code, second.reason, len(store.offsets)) == (first.code, first.reason, calls)
    assert second.retry_after_seconds > 0


async def test_the_others_are_fetched_meanwhile(answers: Answers, store: FakeStore, tmp_path: Path) -> None:
    store.adapters["rank-8"] = store.adapters["rank-8"].corrupted(tmp_path)
    await answers.fetch("rank-8")
    assert (await answers.fetch("rank-3")).HasField("adapter_fetched")


async def test_a_silent_store_is_unavailable(
    answers: Answers, store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "SILENCE_SECONDS", 0.05)
    store.answering.clear()
    error = (await answers.fetch("rank-8")).adapter_fetch_failed.error
    assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE.value[0], "STORE_SILENT")


async def test_a_crowd_that_wants_one_adapter_fetches_it_once(answers: Answers, store: FakeStore) -> None:
    for _ in range(500):
        answers.ask("rank-8")
    await answers.next()
    assert len(store.offsets) == 1


async def test_a_file_that_the_engine_has_not_opened_stays(store: FakeStore, cache: Path) -> None:
    size = store.adapters["rank-8"].layout.total_bytes
    async with serving(store) as address, asking(address, cache, limit_bytes=size + 100) as answers:
        path = (await answers.fetch("rank-8")).adapter_fetched.path
        answers.ask("rank-3")
        await store.started.get()
        await store.started.get()
        assert files(cache) == [Path(path).name]
        answers.fetcher.settled("rank-8")
        assert (await answers.next()).HasField("adapter_fetched")
        assert Path(path).name not in files(cache)


async def test_bytes_that_the_engine_found_wrong_are_fetched_anew(answers: Answers, store: FakeStore) -> None:
    fetched = (await answers.fetch("rank-8")).adapter_fetched
    answers.fetcher.settled("rank-8")
    answers.fetcher.distrust("rank-8", fetched.layout.sha256)
    await answers.fetch("rank-8")
    assert len(store.offsets) == 2


async def test_a_full_disk_fails_the_adapter_that_came_last(
    answers: Answers, store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: download.Download, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(download.Download, "write", full)
        error = (await answers.fetch("rank-8")).adapter_fetch_failed.error
    assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], "CACHE_DISK_FULL")
    assert (await answers.fetch("rank-3")).HasField("adapter_fetched")


async def test_a_disk_that_is_full_half_way_costs_what_is_worth_less(
    answers: Answers, store: FakeStore, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part of the second chunk is written when the disk is full; another adapter's file makes room for the rest."""
    await answers.fetch("rank-3")
    answers.fetcher.settled("rank-3")
    write, full = download.Download.write, [True]

    def once_full(self: download.Download, data: bytes) -> None:
        if self.received and full:
            full.clear()
            assert self._file is not None
            self._file.write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, data)

    monkeypatch.setattr(download.Download, "write", once_full)
    path = (await answers.fetch("rank-8")).adapter_fetched.path
    assert (full, files(cache), read(path)) == ([], [Path(path).name], store.adapters["rank-8"].content)
