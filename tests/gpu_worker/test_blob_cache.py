"""The folder of fetched adapters keeps its budget and never the bytes of somebody else under a good name."""

import asyncio
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import FailedPrecondition
from common.packing import PackedLayout
from gpu_worker.blob_cache import BlobCache

LIMIT = 300


def content(number: int) -> bytes:
    return bytes([number]) * 100


def promised(sha256: str) -> PackedLayout:
    return PackedLayout("float32", 100, (), sha256)


def sha256(number: int) -> str:
    return hashlib.sha256(content(number)).hexdigest()


async def put(cache: BlobCache, number: int) -> str:
    """Downloads and lets go of it; returns its digest."""
    digest = sha256(number)
    partial = await cache.reserve(digest, 100)
    partial.path.write_bytes(content(number))
    cache.keep(partial, seconds=0.1)
    cache.release(digest)
    return digest


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[BlobCache]:
    cache = BlobCache(tmp_path, LIMIT)
    yield cache
    cache.close()


def names(folder: Path, pattern: str) -> list[str]:
    return sorted(path.stem for path in folder.glob(pattern))


def sizes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.packed"))


async def test_the_files_never_exceed_the_budget(cache: BlobCache, tmp_path: Path) -> None:
    for number in range(10):
        await put(cache, number)
        assert sizes(tmp_path) == cache.used_bytes <= LIMIT


async def test_a_file_in_use_stays_while_others_go(cache: BlobCache) -> None:
    held = await put(cache, 0)
    assert await cache.find(promised(held)) is not None
    for number in range(1, 8):
        await put(cache, number)
    assert cache.path(held).read_bytes() == content(0)


async def test_a_download_waits_while_everything_is_in_use(cache: BlobCache) -> None:
    digests = [await put(cache, number) for number in range(3)]
    for digest in digests:
        await cache.find(promised(digest))
    waiting = asyncio.create_task(cache.reserve(sha256(3), 100))
    await asyncio.sleep(0)
    assert not waiting.done()
    cache.release(digests[1])
    await waiting
    assert not cache.path(digests[1]).exists()


async def test_an_adapter_larger_than_the_budget_is_refused_with_both_numbers(cache: BlobCache) -> None:
    with pytest.raises(FailedPrecondition, match="301 bytes; the worker's cache may hold 300"):
        await cache.reserve("f" * 64, 301)


async def test_an_abandoned_download_gives_its_bytes_back(cache: BlobCache, tmp_path: Path) -> None:
    partial = await cache.reserve(sha256(0), 100)
    partial.path.write_bytes(b"half")
    cache.abandon(partial)
    assert (cache.used_bytes, names(tmp_path, "*.partial")) == (0, [])


async def test_what_an_earlier_life_left_is_booked_and_shrunk(tmp_path: Path) -> None:
    for number in range(5):
        path = tmp_path / f"{sha256(number)}.packed"
        path.write_bytes(content(number))
        os.utime(path, (number, number))
    (tmp_path / "x.partial").write_bytes(b"half")
    cache = BlobCache(tmp_path, LIMIT)
    assert names(tmp_path, "*.p*") == sorted(sha256(number) for number in (2, 3, 4))
    assert await cache.find(promised(sha256(4))) is not None
    cache.close()


async def test_a_file_that_changed_is_read_again_and_given_up(cache: BlobCache) -> None:
    digest = await put(cache, 0)
    cache.path(digest).write_bytes(b"other")
    assert await cache.find(promised(digest)) is None
    assert not cache.path(digest).exists()


async def test_a_full_disk_costs_what_is_worth_least(cache: BlobCache) -> None:
    first, second = await put(cache, 0), await put(cache, 1)
    assert cache.shrink(100)
    assert (cache.path(first).exists(), cache.path(second).exists()) == (False, True)


def test_a_folder_has_one_worker(cache: BlobCache, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="another worker is using the cache folder"):
        BlobCache(tmp_path, LIMIT)
