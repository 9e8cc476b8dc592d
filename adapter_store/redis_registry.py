"""The registry of stores that share one volume: Redis decides who wins and tells the others.

    write   manifest prepared -> CHANGE in Redis gives the sequence -> manifest linked -> index takes it in -> reply
    read    from the index of this process, which follows the stream of changes

Redis is an index too. When it is empty, or older than the manifest on disk, the first store that sees it makes it again
and goes on with higher sequences. When it is away, reads go on and writes are refused at once.
"""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from redis.exceptions import OutOfMemoryError, RedisError

from adapter_store.failpoints import failpoint
from adapter_store.index import KEPT_REMOVALS
from adapter_store.indexed_registry import unavailable
from adapter_store.manifest import Manifest, PendingRecord, Record, SequenceUsedError
from adapter_store.metrics import RedisMetrics
from adapter_store.redis_link import RedisLink
from adapter_store.redis_mirror import RedisMirror
from adapter_store.registry import Alias, Version, WrongVersionError
from common.errors import LoraplexError, ResourceExhausted

_FIRST_BACKOFF_SECONDS = 0.1
_MAX_BACKOFF_SECONDS = 1.0

_log = logging.getLogger(__name__)


class RedisRegistry(RedisMirror):
    """Implements `Registry`."""

    def __init__(
        self,
        link: RedisLink,
        index_path: Path,
        manifest: Manifest,
        metrics: RedisMetrics,
        kept_removals: int = KEPT_REMOVALS,
    ) -> None:
        super().__init__(link, index_path, manifest, kept_removals)
        self._metrics = metrics
        self._looking = asyncio.Lock()
        # One call at a time, so that the time allowed for it is spent on Redis and not on a crowd of connections.
        self._changing = asyncio.Lock()
        self._follower: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """As the index's; then follows Redis, whether it is there or not."""
        await super().open()
        with suppress(LoraplexError):
            await self.refresh()
        self._follower = asyncio.create_task(self._follow())

    async def close(self) -> None:
        while self._follower is not None and not self._follower.done():
            # Again and again: a cancellation that meets a timeout inside the Redis client is lost.
            self._follower.cancel()
            await asyncio.wait([self._follower], timeout=_FIRST_BACKOFF_SECONDS)
        await self._link.close()
        await super().close()

    async def get(self, tenant: str, adapter_id: str, digest: str = "") -> Alias | None:
        alias = await super().get(tenant, adapter_id, digest)
        if alias is None and await self._look_again():
            alias = await super().get(tenant, adapter_id, digest)
        return alias

    async def held(self, tenant: str, digest: str) -> Version | None:
        version = await super().held(tenant, digest)
        if version is None and await self._look_again():
            version = await super().held(tenant, digest)
        return version

    def check_writable(self) -> None:
        if not self._up:
            raise unavailable()

    async def add_version(self, version: Version) -> None:
        self.check_writable()
        await self._run(lambda: self._index.add_versions([version]))
        async with self._changing:
            self.check_writable()
            with self._redis_errors():
                await self._link.add_version(version)

    async def point(self, tenant: str, adapter_id: str, digest: str, *, expected: str | None, now: float) -> Alias:
        await self._change(Record(0, tenant, adapter_id, digest, now), expected)
        # Whoever moved it since then did so after us.
        alias = await super().get(tenant, adapter_id, digest)
        if alias is None:
            raise unavailable()
        return alias

    async def remove(self, tenant: str, adapter_id: str, *, expected: str | None, now: float) -> str:
        return await self._change(Record(0, tenant, adapter_id, None, now), expected)

    async def refresh(self) -> None:
        """Takes in what others changed. Raises Unavailable when Redis is away."""
        with self._redis_errors():
            await self._sync()
        self._metrics.synced()
        self._set_up(True)

    async def release(self, before: float) -> None:
        with self._redis_errors():
            await self._link.release(before)
        await self._run(lambda: self._forget_old_changes(before))

    async def forget(self, digest: str) -> bool:
        with self._redis_errors():
            if not await self._link.forget(self._known(), digest):
                return False
        await self._run(lambda: self._index.forget(digest))
        return True

    async def _change(self, record: Record, expected: str | None) -> str:
        """Returns what the id pointed to before. Raises as `point` does."""
        self.check_writable()
        pending = await asyncio.to_thread(
            self._manifest.prepare, record.tenant, record.adapter_id, record.digest, record.at
        )
        try:
            before = await self._decide(record, expected, pending)
        finally:
            await asyncio.to_thread(pending.discard)
        await self.refresh()
        return before

    async def _decide(self, record: Record, expected: str | None, pending: PendingRecord) -> str:
        """Redis gives the sequence, and the manifest has the change before anybody is told of it."""
        async with self._changing:
            # Those who waited behind one that failed need not try.
            self.check_writable()
            with self._redis_errors():
                answer = await self._link.change(self._known(), record, expected)
                if answer[0] == "stale":
                    await self._sync()
                    answer = await self._link.change(self._known(), record, expected)
        verdict, *details = answer
        if verdict == "wrong":
            raise WrongVersionError(details[0] or None)
        if verdict == "same":
            return record.digest or ""
        if verdict != "done":
            raise unavailable()
        failpoint("before-journal")
        try:
            await asyncio.to_thread(pending.commit, int(details[0]))
        except SequenceUsedError:
            self._contradicted = True
            self._set_up(False)
            raise unavailable() from None
        failpoint("after-journal")
        return details[1]

    async def _follow(self) -> None:
        """Keeps the index up to date until cancelled."""
        backoff = _FIRST_BACKOFF_SECONDS
        while True:
            try:
                await self.refresh()
                backoff = _FIRST_BACKOFF_SECONDS
                with self._redis_errors():
                    await self._link.news(self._newest)
            except Exception as error:
                if not isinstance(error, LoraplexError):
                    _log.exception("following Redis failed")
                self._set_up(False)
                await asyncio.sleep(backoff)
                backoff = min(2 * backoff, _MAX_BACKOFF_SECONDS)

    async def _look_again(self) -> bool:
        """Whether a miss may be because another store was faster than the stream."""
        before = self._newest
        async with self._looking:
            if self._up:
                with suppress(LoraplexError):
                    await self.refresh()
        return self._newest > before

    def _set_up(self, up: bool) -> None:
        if up != self._up:
            _log.log(logging.INFO if up else logging.WARNING, "Redis answers" if up else "Redis does not answer")
        self._up = up
        self._metrics.up.set(up)

    @contextmanager
    def _redis_errors(self) -> Iterator[None]:
        """Turns a failure of Redis into an error of the store."""
        try:
            yield
        except (RedisError, OSError) as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> LoraplexError:
        """Closes the door to writes, unless Redis itself is well and only refuses this one."""
        self._metrics.errors.labels(type(error).__name__).inc()
        if isinstance(error, OutOfMemoryError):
            message = "the adapter store's Redis is full"
            return ResourceExhausted("REGISTRY_FULL", message, retry_after_seconds=60.0)
        _log.warning("Redis failed: %s", error.__class__.__name__)
        self._set_up(False)
        return unavailable()
