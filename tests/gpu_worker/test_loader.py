"""The copying thread: who hears that a copy has ended, once each, and what a bad adapter does to the others."""

import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpu_worker.host_storage import HostBlob, MappedFiles
from gpu_worker.loader import LoadDone, Loader, _Job
from gpu_worker.memory.geometry import PageGeometry
from gpu_worker.memory.pool import PagePool
from tests.gpu_worker.tiny_model import LAYERS, TinyAdapter, write_adapter

GEOMETRY = PageGeometry(num_layers=LAYERS, num_kv_heads=2, head_dim=8, element_bytes=4, page_size=4)
# A copy takes microseconds; only a bug makes it take this long.
SECONDS = 100.0


class Mute(Loader):
    """A thread that has copied and cannot say so: it has no turn at the interpreter until `may_speak`."""

    def __init__(self, pool: PagePool, told: "queue.SimpleQueue[LoadDone]") -> None:
        self.copied, self.may_speak = threading.Semaphore(0), threading.Event()
        super().__init__(pool, told.put)

    def _do(self, job: _Job) -> LoadDone:
        done = super()._do(job)
        self.copied.release()
        assert self.may_speak.wait(SECONDS)
        return done


class Bench:
    """A loader with its thread held, adapters for it, and what it told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pool = PagePool(GEOMETRY, 64, "cpu")
        self.told: queue.SimpleQueue[LoadDone] = queue.SimpleQueue()
        self.loader = Mute(self.pool, self.told)

    def load(self, adapter: TinyAdapter, first_page: int) -> list[int]:
        pages = list(range(first_page, first_page + adapter.num_pages))
        blob: HostBlob = MappedFiles().open(adapter.path, adapter.layout)
        self.loader.load(adapter.version, blob, pages)
        return pages

    def copied(self) -> None:
        assert self.loader.copied.acquire(timeout=SECONDS)

    def held(self, pages: list[int], adapter: TinyAdapter) -> bytes:
        return self.pool.bytes[pages].numpy().tobytes()[: adapter.layout.total_bytes]

    def end(self) -> list[LoadDone]:
        """Lets the thread speak until it has nothing to do; returns what it told."""
        self.loader.may_speak.set()
        self.loader.stop()
        return [self.told.get() for _ in range(self.told.qsize())]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.end()


def test_a_copy_is_known_before_its_thread_can_say_so_and_told_once(bench: Bench) -> None:
    adapter = write_adapter(bench.folder, "a", lora_rank=3)
    before = time.perf_counter()
    pages = bench.load(adapter, 7)
    bench.copied()
    (done,) = bench.loader.take_done()
    assert (done.adapter_version, done.failure) == ("a", "")
    assert 0 < done.seconds <= time.perf_counter() - before
    assert bench.held(pages, adapter) == adapter.content
    assert bench.loader.take_done() == []
    assert bench.end() == []


def test_what_nobody_took_the_thread_tells(bench: Bench) -> None:
    bench.load(write_adapter(bench.folder, "a", lora_rank=3), 7)
    bench.copied()
    assert [(done.adapter_version, done.failure) for done in bench.end()] == [("a", "")]
    assert bench.loader.take_done() == []


def test_wrong_bytes_are_for_the_thread_to_tell_and_harm_nobody_else(bench: Bench, tmp_path: Path) -> None:
    bad = write_adapter(bench.folder, "bad", lora_rank=3).corrupted(tmp_path)
    good = write_adapter(bench.folder, "good", lora_rank=3)
    bench.load(bad, 7)
    bench.copied()
    assert bench.loader.take_done() == []
    pages = bench.load(good, 17)
    bench.loader.may_speak.set()
    bench.copied()
    told = [*bench.loader.take_done(), *bench.end()]
    assert {done.adapter_version: bool(done.failure) for done in told} == {bad.version: True, "good": False}
    assert len(told) == 2
    assert bench.held(pages, good) == good.content


def test_without_compiled_copies_only_the_thread_tells(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.cpu.pages.library", lambda: None)
    bench.load(write_adapter(bench.folder, "a", lora_rank=3), 7)
    bench.copied()
    assert bench.loader.take_done() == []
    assert [(done.adapter_version, done.failure) for done in bench.end()] == [("a", "")]


def test_a_copy_that_has_not_begun_is_not_taken(bench: Bench) -> None:
    first, second = (write_adapter(bench.folder, name, lora_rank=3) for name in "ab")
    bench.load(first, 7)
    bench.load(second, 17)
    bench.copied()
    assert [done.adapter_version for done in bench.loader.take_done()] == ["a"]
    assert [done.adapter_version for done in bench.end()] == ["b"]


def test_many_copies_are_each_told_once(tmp_path: Path) -> None:
    """Taken while the thread tells: every load is heard of exactly once."""
    adapters = [write_adapter(tmp_path, f"adapter-{number}", lora_rank=3) for number in range(4)]
    pool, told = PagePool(GEOMETRY, 64, "cpu"), queue.SimpleQueue[LoadDone]()
    loader = Loader(pool, told.put)
    taken, count = list[LoadDone](), 200
    for number in range(count):
        adapter = adapters[number % 4]
        pages = list(range(10 * (number % 4), 10 * (number % 4) + adapter.num_pages))
        loader.load(adapter.version, MappedFiles().open(adapter.path, adapter.layout), pages)
        taken += loader.take_done()
    loader.stop()
    taken += [*loader.take_done(), *(told.get() for _ in range(told.qsize()))]
    assert [sum(done.adapter_version == adapter.version for done in taken) for adapter in adapters] == [count // 4] * 4
    assert not any(done.failure for done in taken)
