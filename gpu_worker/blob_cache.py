"""The worker's folder of fetched adapters: packed strings by sha256, within a budget of bytes."""

import asyncio
import fcntl
import logging
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from common.checksum import Checksum, Promised
from common.errors import FailedPrecondition
from gpu_worker.byte_budget import ByteBudget

_log = logging.getLogger(__name__)

SUFFIX, PARTIAL = ".packed", ".partial"
# Of a file that an earlier life of the worker left; those of this life were measured.
ASSUMED_SECONDS_PER_BYTE = 1e-8
ASSUMED_SECONDS = 0.01
_READ_BYTES = 1 << 20

_Stamp = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Partial:
    """Bytes on their way into the folder; `num_bytes` are set aside for them."""

    sha256: str
    path: Path
    num_bytes: int


class BlobCache:
    """Files of the folder and what they are worth. Deletes the least valuable first, never one that is held.

    Used from one event loop; only reading whole files happens on a thread.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        """Raises OSError when the folder cannot be used, ValueError when another worker uses it."""
        self._folder = folder
        self._budget: ByteBudget[str] = ByteBudget(limit_bytes)
        # What a file looked like when its bytes were found right.
        self._verified: dict[str, _Stamp] = {}
        self._released = asyncio.Event()
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(folder)
        self._adopt()

    @property
    def used_bytes(self) -> int:
        return self._budget.used_bytes

    @property
    def limit_bytes(self) -> int:
        return self._budget.limit_bytes

    def __len__(self) -> int:
        return len(self._budget)

    def close(self) -> None:
        """Another worker may have the folder."""
        self._lock.close()

    def path(self, sha256: str) -> Path:
        return self._folder / f"{sha256}{SUFFIX}"

    async def find(self, promised: Promised) -> Path | None:
        """The file with the promised bytes, held until `release`; None when it is not there or has others."""
        sha256 = promised.sha256
        if sha256 not in self._budget:
            return None
        self._budget.hold(sha256)
        path = self.path(sha256)
        if not await self._is_right(path, promised):
            self.release(sha256)
            self.discard(sha256)
            return None
        self._budget.use(sha256)
        return path

    def release(self, sha256: str) -> None:
        """Ends a hold of `find` or `keep`; nothing to do when the file was discarded meanwhile."""
        if sha256 in self._budget:
            self._budget.release(sha256)
        self._released.set()

    async def reserve(self, sha256: str, num_bytes: int) -> Partial:
        """Sets bytes aside for a download, waiting while everything is held.

        Raises FailedPrecondition with both numbers when the string is larger than the whole budget.
        """
        if num_bytes > self.limit_bytes:
            message = f"the adapter has {num_bytes} bytes; the worker's cache may hold {self.limit_bytes}"
            raise FailedPrecondition("ADAPTER_TOO_LARGE", message)
        partial = Partial(sha256, self._folder / f"{sha256}.{uuid.uuid4().hex}{PARTIAL}", num_bytes)
        while not self._make_room(num_bytes):
            self._released.clear()
            await self._released.wait()
        self._budget.add(partial.path.name, num_bytes, 0.0)
        self._budget.hold(partial.path.name)
        return partial

    def keep(self, partial: Partial, seconds: float) -> Path:
        """The download is whole and verified: gives it its name and holds it. Raises OSError."""
        path = self.path(partial.sha256)
        partial.path.replace(path)
        self._budget.remove(partial.path.name)
        if partial.sha256 not in self._budget:
            self._budget.add(partial.sha256, partial.num_bytes, seconds)
        self._budget.hold(partial.sha256)
        self._verified[partial.sha256] = _stamp(path)
        return path

    def abandon(self, partial: Partial) -> None:
        """Ends a download that did not become a file, if it did not."""
        partial.path.unlink(missing_ok=True)
        if partial.path.name in self._budget:
            self._budget.remove(partial.path.name)
            self._released.set()

    def discard(self, sha256: str) -> None:
        """Deletes a file whose bytes were found wrong."""
        if sha256 in self._budget:
            self._budget.remove(sha256)
            self._delete(sha256)

    def shrink(self, num_bytes: int) -> bool:
        """Deletes files worth least until `num_bytes` are gone, because the disk is full; False when none could be."""
        victims = self._budget.shrink(num_bytes)
        for sha256 in victims:
            self._delete(sha256)
        return bool(victims)

    def _make_room(self, num_bytes: int) -> bool:
        victims = self._budget.make_room(num_bytes)
        for sha256 in victims or ():
            self._delete(sha256)
        return victims is not None

    def _delete(self, sha256: str) -> None:
        self._verified.pop(sha256, None)
        try:
            self.path(sha256).unlink(missing_ok=True)
        except OSError as error:
            _log.error("a cached adapter cannot be deleted: %s", error.strerror)

    def _adopt(self) -> None:
        """Books what an earlier life left, the oldest first, and deletes what it did not finish."""
        found = []
        for path in self._folder.iterdir():
            if path.suffix == PARTIAL:
                path.unlink(missing_ok=True)
            elif path.suffix == SUFFIX and path.is_file():
                found.append((path.stat().st_mtime_ns, path.stem, path.stat().st_size))
        for _, sha256, num_bytes in sorted(found):
            self._budget.add(sha256, num_bytes, ASSUMED_SECONDS + num_bytes * ASSUMED_SECONDS_PER_BYTE)
        self._make_room(0)

    async def _is_right(self, path: Path, promised: Promised) -> bool:
        """A file is read whole once, and again only after it has changed: whoever copies it verifies the copy."""
        try:
            stamp = _stamp(path)
            if self._verified.get(promised.sha256) != stamp:
                if not await asyncio.to_thread(_holds, path, promised):
                    return False
                self._verified[promised.sha256] = stamp
        except OSError:
            return False
        return True


def _locked(folder: Path) -> TextIO:
    """Two workers that delete each other's files would keep neither budget. The kernel drops the lock with us."""
    lock = (folder / "lock").open("w", encoding="ascii")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise ValueError(f"another worker is using the cache folder {folder}; give each its own --cache-dir") from None
    return lock


def _stamp(path: Path) -> _Stamp:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_size


def _holds(path: Path, promised: Promised) -> bool:
    checksum = Checksum(promised)
    with path.open("rb") as file:
        while data := file.read(_READ_BYTES):
            checksum.update(data)
    return checksum.holds()
