"""What both registries share: reads come from an index of this process, so they need nobody else."""

import asyncio
import logging
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from adapter_store.index import KEPT_REMOVALS, Index
from adapter_store.manifest import Manifest, Record
from adapter_store.registry import Alias, Changes, Totals, Version
from common.errors import Unavailable

_Result = TypeVar("_Result")

# More than the changes that can have been given out and lost: a sequence never means two changes.
REBUILD_GAP = 1_000_000

_log = logging.getLogger(__name__)


def unavailable() -> Unavailable:
    message = "the adapter store's registry does not answer"
    return Unavailable("REGISTRY_UNAVAILABLE", message, retry_after_seconds=1.0)


class IndexedRegistry:
    """The reading half of a `Registry`. One thread owns the index, so the event loop never waits for the disk."""

    def __init__(self, index_path: Path, manifest: Manifest, kept_removals: int = KEPT_REMOVALS) -> None:
        self._index = Index(index_path, kept_removals)
        self._index_path = index_path
        self._manifest = manifest
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="registry")
        self._newest = 0
        self._stopped = self._closed = False
        self._changed = asyncio.Event()

    async def open(self) -> None:
        """Opens or makes the index and brings it up to the manifest. Raises OSError when it cannot."""
        try:
            self._newest = await asyncio.get_running_loop().run_in_executor(self._thread, self._open)
        except (sqlite3.Error, OSError) as error:
            self._thread.shutdown()
            raise OSError(f"cannot open {self._index_path}: {error}") from error

    async def close(self) -> None:
        """Safe to call again."""
        self.stop_waiting()
        if not self._closed:
            self._closed = True
            await self._run(self._index.close)
            self._thread.shutdown()

    async def get(self, tenant: str, adapter_id: str, digest: str = "") -> Alias | None:
        return await self._run(lambda: self._index.get(tenant, adapter_id, digest))

    async def held(self, tenant: str, digest: str) -> Version | None:
        return await self._run(lambda: self._index.held(tenant, digest))

    async def page(self, tenant: str, *, after: str, limit: int) -> list[Alias]:
        return await self._run(lambda: self._index.page(tenant, after, limit))

    async def changes(self, tenant: str, after: int) -> Changes:
        return await self._run(lambda: self._index.changes(tenant, after))

    async def garbage(self) -> list[str]:
        return await self._run(self._index.garbage)

    async def totals(self, tenant: str = "") -> Totals:
        return await self._run(lambda: self._index.totals(tenant))

    async def wait(self, after: int) -> None:
        while self._newest <= after:
            if self._stopped:
                raise Unavailable("STOPPING", "the adapter store is stopping", retry_after_seconds=1.0)
            await self._changed.wait()

    def stop_waiting(self) -> None:
        self._stopped = True
        self._changed.set()

    async def _run(self, call: Callable[[], _Result]) -> _Result:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, call)
        except sqlite3.OperationalError as error:
            raise unavailable() from error

    def _wake(self, sequence: int) -> None:
        if sequence > self._newest:
            self._newest = sequence
            self._changed.set()
            self._changed = asyncio.Event()

    def _open(self) -> int:
        try:
            self._index.open()
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError:
            _log.warning("the index is damaged; making it again")
            for suffix in ("", "-wal", "-shm"):
                Path(f"{self._index_path}{suffix}").unlink(missing_ok=True)
            self._index.open()
        on_disk = self._manifest.sequences()
        newest = self._index.state().sequence
        current = {record.sequence for record, released_at in self._index.rows() if released_at is None}
        if not current <= set(on_disk):
            _log.warning("the index does not agree with the manifest; making it again")
            self._make_again()
        elif on_disk and on_disk[-1] > newest:
            self._catch_up()
        if on_disk and newest == 0:
            self._start_sequences_over()
        self._index.add_versions(self._manifest.versions(self._manifest.digests() - self._index.digests()))
        return self._index.state().sequence

    def _start_sequences_over(self) -> None:
        """The index was lost, and with it what watchers were told last."""

    def _catch_up(self) -> None:
        """Takes in what the manifest has and the index does not."""
        self._take_in(self._manifest.read(self._index.state().sequence))

    def _make_again(self) -> None:
        with self._index.transaction():
            before = self._index.state()
            self._index.clear()
        self._take_in(self._manifest.read())
        with self._index.transaction():
            # Watchers know more of the old index than the new one can tell them.
            sequence = max(before.sequence, self._index.state().sequence)
            self._index.adopt(before.epoch, sequence)

    def _take_in(self, records: list[Record]) -> None:
        wanted = {record.digest for record in records if record.digest is not None} - self._index.digests()
        versions = self._manifest.versions(wanted)
        missing = wanted - {version.digest for version in versions}
        if missing:
            _log.error("%d adapter versions of the manifest are not on disk", len(missing))
        with self._index.transaction():
            self._index.add_versions(versions)
            for record in records:
                self._index.apply(record)

    def _forget_old_changes(self, before: float) -> None:
        """Ends holds, then removes the changes that only they needed."""
        with self._index.transaction():
            if not self._index.release(before):
                return
            needed, keep_from = self._index.needed_sequences(), self._index.first_former_sequence()
        newest = self._manifest.newest()
        old = (sequence for sequence in self._manifest.sequences() if sequence < min(keep_from, newest))
        self._manifest.forget(sequence for sequence in old if sequence not in needed)
