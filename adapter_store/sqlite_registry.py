"""The registry of a store that is alone on its volume: the manifest, and an index over it."""

from collections.abc import Callable
from typing import TypeVar

from adapter_store.failpoints import failpoint
from adapter_store.indexed_registry import REBUILD_GAP, IndexedRegistry, unavailable
from adapter_store.manifest import Record, SequenceUsedError
from adapter_store.registry import Alias, Version, WrongVersionError

_Result = TypeVar("_Result")


class SqliteRegistry(IndexedRegistry):
    """Implements `Registry`. Every call is one transaction."""

    def check_writable(self) -> None:
        """Nobody else is needed."""

    async def add_version(self, version: Version) -> None:
        await self._run(lambda: self._index.add_versions([version]))

    async def point(self, tenant: str, adapter_id: str, digest: str, *, expected: str | None, now: float) -> Alias:
        alias = await self._write(lambda: self._point(tenant, adapter_id, digest, expected, now))
        self._wake(alias.sequence)
        return alias

    async def remove(self, tenant: str, adapter_id: str, *, expected: str | None, now: float) -> str:
        digest, sequence = await self._write(lambda: self._remove(tenant, adapter_id, expected, now))
        self._wake(sequence)
        return digest

    async def refresh(self) -> None:
        """Nobody else changes anything."""

    async def release(self, before: float) -> None:
        await self._run(lambda: self._forget_old_changes(before))

    async def forget(self, digest: str) -> bool:
        await self._run(lambda: self._index.forget(digest))
        return True

    async def _write(self, call: Callable[[], _Result]) -> _Result:
        try:
            return await self._run(call)
        except SequenceUsedError:
            # A change went to disk and its transaction failed after that; the caller may try again.
            await self._run(self._catch_up)
            raise unavailable() from None

    def _start_sequences_over(self) -> None:
        # The volume may be an old copy: watchers may have heard of later sequences than it has.
        state = self._index.state()
        with self._index.transaction():
            self._index.adopt(state.epoch, state.sequence + REBUILD_GAP)

    def _point(self, tenant: str, adapter_id: str, digest: str, expected: str | None, now: float) -> Alias:
        with self._index.transaction():
            current = self._index.compare(tenant, adapter_id, expected)
            if current is not None and current.version.digest == digest:
                return current
            if not self._index.knows(digest):
                raise unavailable()
            self._record(tenant, adapter_id, digest, now)
            moved = self._index.get(tenant, adapter_id)
        if moved is None:
            raise AssertionError("the row was just written")
        return moved

    def _remove(self, tenant: str, adapter_id: str, expected: str | None, now: float) -> tuple[str, int]:
        with self._index.transaction():
            current = self._index.compare(tenant, adapter_id, expected)
            if current is None:
                raise WrongVersionError(None)
            return current.version.digest, self._record(tenant, adapter_id, None, now)

    def _record(self, tenant: str, adapter_id: str, digest: str | None, now: float) -> int:
        """On disk first: what the manifest has, the index takes in at the next start at the latest."""
        record = Record(self._index.state().sequence + 1, tenant, adapter_id, digest, now)
        with self._manifest.prepare(tenant, adapter_id, digest, now) as pending:
            failpoint("before-journal")
            pending.commit(record.sequence)
        failpoint("after-journal")
        self._index.apply(record)
        return record.sequence
