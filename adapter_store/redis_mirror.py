"""The index of this process and the keys in Redis, made one again when they differ.

Redis ahead: the index takes in what it lacks. Redis behind, empty or contradicting the manifest: it is made again from
the manifest under a new epoch, with sequences that were never used, and watchers start over.
"""

import asyncio
import logging
import secrets
from pathlib import Path

from adapter_store.indexed_registry import REBUILD_GAP, IndexedRegistry, unavailable
from adapter_store.manifest import Manifest, Record, SequenceUsedError
from adapter_store.redis_link import RedisLink, RedisState, Snapshot

_log = logging.getLogger(__name__)


class RedisMirror(IndexedRegistry):
    """What a registry over Redis reads from. Errors of Redis come out as they are."""

    def __init__(self, link: RedisLink, index_path: Path, manifest: Manifest, kept_removals: int) -> None:
        super().__init__(index_path, manifest, kept_removals)
        self._link = link
        self._epoch = ""
        # Redis has answered, and the index agrees with it.
        self._up = False
        # Redis gave out a sequence that the manifest has: it was rolled back, and nobody saw it.
        self._contradicted = False
        self._syncing = asyncio.Lock()

    async def open(self) -> None:
        await super().open()
        self._epoch = (await self._run(self._index.state)).epoch

    def _known(self) -> RedisState:
        return RedisState(self._epoch, str(self._newest))

    async def _sync(self) -> None:
        """Brings the index up to Redis, or Redis up to the manifest."""
        async with self._syncing:
            state = await self._link.state()
            if not self._up or state != self._known():
                # Another life of Redis may have begun while it was away, or is what we see.
                await self._compare(state)

    async def _compare(self, state: RedisState) -> None:
        newest = max(self._newest, await asyncio.to_thread(self._manifest.newest))
        if not state.epoch or state.number < newest or self._contradicted:
            await self._make_redis_again(state, newest)
            return
        try:
            if state.epoch != self._epoch:
                await self._start_over()
            elif state.number > self._newest:
                await self._pull()
        except SequenceUsedError:
            self._contradicted = True
            raise unavailable() from None

    async def _pull(self) -> None:
        while records := await self._link.changes(self._newest):
            if records[0].sequence != self._newest + 1:
                await self._start_over()
                return
            await self._take(records)

    async def _take(self, records: list[Record]) -> None:
        digests = {record.digest for record in records if record.digest is not None}
        versions = await self._link.versions(digests)

        def apply() -> None:
            self._manifest.ensure(records)
            with self._index.transaction():
                self._index.add_versions(versions)
                for record in records:
                    self._index.apply(record)

        await self._run(apply)
        self._wake(records[-1].sequence)

    async def _start_over(self) -> None:
        snapshot = None
        while snapshot is None:
            snapshot = await self._link.snapshot()
        await self._run(lambda: self._load(snapshot))
        self._epoch = snapshot.state.epoch
        self._wake(snapshot.state.number)
        _log.info("read everything from Redis")

    def _load(self, snapshot: Snapshot) -> None:
        current = sorted(
            (record for record, released_at in snapshot.held if released_at is None),
            key=lambda record: record.sequence,
        )
        self._manifest.ensure(current)
        with self._index.transaction():
            self._index.clear()
            self._index.add_versions(snapshot.versions)
            for record in current:
                self._index.apply(record)
            for record, released_at in snapshot.held:
                if released_at is not None:
                    self._index.add_former(record, released_at)
            self._index.adopt(snapshot.state.epoch, snapshot.state.number)

    async def _make_redis_again(self, seen: RedisState, newest: int) -> None:
        """The manifest is the truth: Redis gets what it says, under an epoch of its own."""
        await self._run(self._catch_up)
        held = await self._run(lambda: list(self._index.rows()))
        versions = await self._run(lambda: self._manifest.versions(self._index.digests()))
        newest = max(newest, seen.number)
        new = RedisState(secrets.token_hex(8), str(newest + REBUILD_GAP if newest else 0))
        if not await self._link.install(seen, new, held, versions):
            raise unavailable()
        await self._run(lambda: self._index.adopt(new.epoch, new.number))
        self._epoch, self._contradicted = new.epoch, False
        self._wake(new.number)
        if held:
            _log.warning("made the keys in Redis again from the manifest", extra={"adapters": len(held)})
