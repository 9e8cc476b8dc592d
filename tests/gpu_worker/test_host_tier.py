"""The host tier keeps its budget, and what is about to be copied."""

import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from common.errors import FailedPrecondition
from gpu_worker.host_storage import HostStorage, MappedFiles, PinnedArena, WrongBytesError
from gpu_worker.host_tier import HostTier
from gpu_worker.memory.geometry import PageGeometry
from gpu_worker.memory.pool import PagePool
from tests.gpu_worker.tiny_model import LAYERS, PAGE_BYTES, SHAPES, TinyAdapter, write_adapter

GEOMETRY = PageGeometry(num_layers=LAYERS, num_kv_heads=2, head_dim=8, element_bytes=4, page_size=4)
NUM_PAGES = 64


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[TinyAdapter]:
    """Six of three pages each."""
    folder = tmp_path_factory.mktemp("host")
    return [write_adapter(folder, f"adapter-{number}", lora_rank=3) for number in range(6)]


def tier(limit_adapters: int, adapters: list[TinyAdapter]) -> HostTier:
    """Room for so many of them."""
    limit_bytes = limit_adapters * adapters[0].layout.total_bytes
    return HostTier(GEOMETRY, NUM_PAGES, SHAPES, MappedFiles(), limit_bytes)


def here(host: HostTier) -> set[str]:
    return {version for version, _ in host}


def test_it_never_exceeds_its_budget(adapters: list[TinyAdapter]) -> None:
    host = tier(3, adapters)
    for adapter in adapters:
        assert host.add(adapter.fetched()) is None
        assert host.num_bytes == sum(layout.total_bytes for _, layout in host) <= host.limit_bytes
    assert len(host) == 3


def test_what_is_being_copied_stays(adapters: list[TinyAdapter]) -> None:
    host = tier(2, adapters)
    host.add(adapters[0].fetched())
    host.take("adapter-0")
    for adapter in adapters[1:]:
        host.add(adapter.fetched())
    assert "adapter-0" in host
    host.give_back("adapter-0")


def test_what_the_queue_waits_for_stays(adapters: list[TinyAdapter]) -> None:
    host = tier(2, adapters)
    host.add(adapters[0].fetched())
    host.keep({"adapter-0"})
    for adapter in adapters[1:]:
        host.add(adapter.fetched())
    assert "adapter-0" in host
    host.keep(set())
    for adapter in adapters[1:4]:
        host.add(adapter.fetched())
    assert "adapter-0" not in host


def test_what_finds_no_room_can_be_asked_for_again(adapters: list[TinyAdapter]) -> None:
    host = tier(1, adapters)
    host.add(adapters[0].fetched())
    host.keep({"adapter-0"})
    host.want("adapter-1")
    assert host.add(adapters[1].fetched()) is None
    assert here(host) == {"adapter-0"}
    assert host.want("adapter-1")


def test_an_adapter_larger_than_the_tier_is_refused_with_both_numbers(adapters: list[TinyAdapter]) -> None:
    size = adapters[0].layout.total_bytes
    host = HostTier(GEOMETRY, NUM_PAGES, SHAPES, MappedFiles(), size - 1)
    error = host.add(adapters[0].fetched())
    assert isinstance(error, FailedPrecondition)
    assert f"{size} bytes; the worker's host tier holds {size - 1}" in error.message


def test_every_coming_and_going_is_told_once(adapters: list[TinyAdapter]) -> None:
    host = tier(1, adapters)
    host.add(adapters[0].fetched())
    host.add(adapters[1].fetched())
    changes = [(change.adapter_version, change.here) for change in host.take_changes()]
    assert changes == [("adapter-0", True), ("adapter-0", False), ("adapter-1", True)]
    assert host.take_changes() == []


class TestStorage:
    """Both kinds behind the seam, copies compiled and plain; an arena that is not pinned is the same class."""

    @pytest.fixture(autouse=True, params=["compiled", "plain"])
    def copies(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        if request.param == "plain":
            monkeypatch.setattr("kernels.cpu.pages.library", lambda: None)

    @pytest.fixture(params=["mapped", "arena"])
    def storage(self, request: pytest.FixtureRequest) -> HostStorage:
        if request.param == "mapped":
            return MappedFiles()
        return PinnedArena(GEOMETRY, 16 * PAGE_BYTES, pinned=False)

    @pytest.fixture
    def adapter(self, tmp_path: Path) -> TinyAdapter:
        return write_adapter(tmp_path, "a", lora_rank=3)

    @pytest.fixture
    def pool(self) -> PagePool:
        return PagePool(GEOMETRY, NUM_PAGES, "cpu")

    def held(self, pool: PagePool, pages: list[int], adapter: TinyAdapter) -> bytes:
        data = np.concatenate([pool.bytes[page].numpy() for page in pages])
        return data.tobytes()[: adapter.layout.total_bytes]

    def test_a_copy_is_the_file(self, storage: HostStorage, adapter: TinyAdapter, pool: PagePool) -> None:
        pages = [40, 3, 17][: adapter.num_pages]
        storage.open(adapter.path, adapter.layout).copy_to(pool, pages)
        assert self.held(pool, pages, adapter) == adapter.content

    def test_a_file_may_go_once_it_is_open(self, storage: HostStorage, adapter: TinyAdapter, pool: PagePool) -> None:
        blob, content = storage.open(adapter.path, adapter.layout), adapter.content
        adapter.path.unlink()
        blob.copy_to(pool, [0, 1, 2])
        assert self.held(pool, [0, 1, 2], adapter) == content

    def test_a_second_copy_is_the_same(self, storage: HostStorage, adapter: TinyAdapter, pool: PagePool) -> None:
        blob = storage.open(adapter.path, adapter.layout)
        blob.copy_to(pool, [0, 1, 2])
        blob.copy_to(pool, [7, 6, 5])
        assert self.held(pool, [7, 6, 5], adapter) == adapter.content

    def test_wrong_bytes_are_found(
        self, storage: HostStorage, adapter: TinyAdapter, pool: PagePool, tmp_path: Path
    ) -> None:
        blob = storage.open(adapter.corrupted(tmp_path).path, adapter.layout)
        with pytest.raises(WrongBytesError, match="checksum"):
            blob.copy_to(pool, [0, 1, 2])

    def test_a_file_overwritten_once_it_is_open_is_found(
        self, storage: HostStorage, adapter: TinyAdapter, pool: PagePool
    ) -> None:
        blob = storage.open(adapter.path, adapter.layout)
        with adapter.path.open("r+b") as file:
            file.seek(adapter.layout.total_bytes - 1)
            file.write(bytes([adapter.content[-1] ^ 1]))
        with pytest.raises(WrongBytesError, match="checksum"):
            blob.copy_to(pool, [0, 1, 2])

    def test_a_file_overwritten_again_and_again_is_whole_or_refused(
        self, storage: HostStorage, adapter: TinyAdapter, pool: PagePool
    ) -> None:
        content, stop = adapter.content, threading.Event()

        def overwrite() -> None:
            with adapter.path.open("r+b", buffering=0) as file:
                while not stop.is_set():
                    for data in (bytes(len(content)), content):
                        file.seek(0)
                        file.write(data)

        writer = threading.Thread(target=overwrite)
        writer.start()
        try:
            for _ in range(100):
                blob = storage.open(adapter.path, adapter.layout)
                with suppress(WrongBytesError):
                    blob.copy_to(pool, [0, 1, 2])
                    assert self.held(pool, [0, 1, 2], adapter) == content
                blob.close()
        finally:
            stop.set()
            writer.join()

    def test_a_file_of_another_size_is_not_opened(self, storage: HostStorage, adapter: TinyAdapter) -> None:
        adapter.path.write_bytes(adapter.content[:-1])
        with pytest.raises(WrongBytesError, match="bytes are"):
            storage.open(adapter.path, adapter.layout)

    def test_room_is_given_back(self, storage: HostStorage, adapter: TinyAdapter) -> None:
        for _ in range(100):
            storage.open(adapter.path, adapter.layout).close()


def test_an_arena_that_is_full_says_so(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path, "a", lora_rank=3)
    arena = PinnedArena(GEOMETRY, 4 * PAGE_BYTES, pinned=False)
    arena.open(adapter.path, adapter.layout)
    with pytest.raises(WrongBytesError, match="no room"):
        arena.open(adapter.path, adapter.layout)
