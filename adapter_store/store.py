"""The adapter store itself: what the handlers call, with no wire and no disk layout in it."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass

from adapter_store.base import ServedBase
from adapter_store.blobs import Blobs, StagedAdapter
from adapter_store.clock import Clock
from adapter_store.derive import Form, open_form
from adapter_store.export import export_chunks
from adapter_store.failpoints import failpoint
from adapter_store.metrics import StoreMetrics
from adapter_store.packed_reader import PackedReader, damaged
from adapter_store.registry import ABSENT, Alias, Registry, Version, WrongVersionError
from adapter_store.validation import Admitted, admit
from common.errors import AlreadyExists, Conflict, DataLoss, LoraplexError, NotFound, ResourceExhausted, Unavailable
from loraplex.v1 import adapter_store_pb2 as pb

# How late the bytes of a deleted adapter may go after their grace.
SWEEP_SECONDS = 30.0
# Admission holds weights in memory: this many at a time.
_MAX_ADMISSIONS = 2
# How long, and how often, a publisher tries while another store removes objects from the same volume.
_VOLUME_SECONDS = 5.0
_VOLUME_RETRY_SECONDS = 0.005

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Target:
    """Where an upload goes: the id, and what it may replace."""

    tenant: str
    adapter_id: str
    expected_version: str
    replace: bool


@dataclass(frozen=True, slots=True)
class Policy:
    """How long deleted bytes stay, and what one tenant may have; 0 sets no limit."""

    delete_grace_seconds: float
    tenant_max_adapters: int = 0
    tenant_max_bytes: int = 0


class AdapterStore:
    """Publishes, finds, moves and removes adapters. Tenants are verified by the caller."""

    def __init__(
        self,
        registry: Registry,
        blobs: Blobs,
        base: ServedBase | None,
        metrics: StoreMetrics,
        clock: Clock,
        policy: Policy,
    ) -> None:
        self.registry = registry
        self._blobs = blobs
        self._base = base
        self._metrics = metrics
        self._clock = clock
        self._policy = policy
        # Versions whose stored bytes failed their checksum: not served again, and replaced by the next upload.
        self._damaged: set[str] = set()
        self._admissions = asyncio.Semaphore(_MAX_ADMISSIONS)
        # An object must not be swept between its rename and the id that points to it.
        self._objects = asyncio.Lock()
        # Each makes a copy of a whole adapter.
        self._deriving = asyncio.Lock()
        self._publishing: set[asyncio.Task[tuple[Alias, bool, Admitted]]] = set()

    def stage(self) -> StagedAdapter:
        """An empty staged adapter; the caller publishes or discards it."""
        return self._blobs.stage()

    async def publish(self, staged: StagedAdapter, target: Target) -> tuple[Alias, bool, Admitted]:
        """Admits a sealed upload and points the id to it, even if the caller goes away meanwhile.

        Returns the alias, whether it was created or moved, and the admission. Raises what `admit` raises, AlreadyExists
        when the id points to other bytes, Conflict when it does not point to the expected version.
        """
        task = asyncio.create_task(self._publish(staged, target))
        self._publishing.add(task)
        task.add_done_callback(self._publishing.discard)
        return await asyncio.shield(task)

    async def get(self, tenant: str, adapter_id: str, digest: str) -> Alias:
        """The id and what it points to now, or the given version. Raises NotFound."""
        alias = await self.registry.get(tenant, adapter_id, digest)
        if alias is None:
            raise _not_found(adapter_id)
        return alias

    async def delete(self, tenant: str, adapter_id: str, expected_version: str) -> str:
        """Removes the id and returns what it pointed to. Raises NotFound, or Conflict when that was not expected."""
        try:
            digest = await self.registry.remove(
                tenant, adapter_id, expected=expected_version or None, now=self._clock.now()
            )
        except WrongVersionError as error:
            if error.current is None:
                raise _not_found(adapter_id) from None
            raise _conflict(adapter_id, error.current, expected_version) from None
        await self.refresh_metrics()
        return digest

    async def set_alias(self, tenant: str, adapter_id: str, expected_version: str, digest: str) -> Alias:
        """Points the id to a version the tenant holds. Raises NotFound for the version, Conflict for the id."""
        async with self._objects, self._volume():
            if await self.registry.held(tenant, digest) is None:
                raise NotFound("ADAPTER_NOT_FOUND", f"adapter version {digest} not found")
            try:
                alias = await self.registry.point(
                    tenant, adapter_id, digest, expected=expected_version or ABSENT, now=self._clock.now()
                )
            except WrongVersionError as error:
                raise _conflict(adapter_id, error.current, expected_version) from None
        await self.refresh_metrics()
        return alias

    async def open_packed(self, tenant: str, digest: str, dtype: str, tp_rank: int, tp_size: int) -> PackedReader:
        """The packed string of a version the tenant holds; the caller closes it. An empty dtype means its own.

        Raises NotFound, DataLoss when the stored bytes are damaged, FailedPrecondition when the version cannot be had
        in this dtype or in so many parts.
        """
        version = await self.registry.held(tenant, digest)
        if version is None:
            raise NotFound("ADAPTER_NOT_FOUND", f"adapter version {digest} not found")
        if digest in self._damaged:
            raise damaged(version)
        form = Form(dtype or version.dtype, tp_rank, tp_size or 1)
        try:
            async with nullcontext() if form.is_own(version) else self._deriving:
                return await asyncio.to_thread(open_form, self._blobs, version, form)
        except DataLoss:
            raise self.found_damaged(digest) from None

    def export(self, version: Version) -> Iterator[pb.UploadChunk]:
        """The files as they were uploaded; `next` blocks. Raises DataLoss when they are damaged."""
        return export_chunks(self._blobs, version)

    def found_damaged(self, digest: str) -> DataLoss:
        """Bytes just read are not those once written, or are gone: they are not served again, and the next upload
        mends them. Returns the error to raise."""
        _log.error("stored bytes are missing or failed their checksum", extra={"adapter_version": digest})
        self._metrics.verify_failures.labels("read").inc()
        self._blobs.drop_derived(digest)
        self._damaged.add(digest)
        return DataLoss("ADAPTER_DAMAGED", f"the stored bytes of adapter version {digest} are damaged")

    async def sweep(self) -> None:
        """Removes the bytes of versions that nobody has held for the grace. Raises Unavailable as the registry does."""
        await self.registry.release(self._clock.now() - self._policy.delete_grace_seconds)
        async with self._objects:
            sweeping = self._blobs.begin_sweep()
            if sweeping is not None:
                try:
                    await self._remove_garbage()
                finally:
                    sweeping.close()
        await self.refresh_metrics()

    async def sweep_forever(self) -> None:
        """Sweeps now and then until it is cancelled; a failure is logged and the next sweep tries again."""
        while True:
            try:
                await self.sweep()
            except LoraplexError as error:
                _log.warning("no sweep: %s", error.message)
            except Exception:
                _log.exception("a sweep failed")
            await self._clock.sleep(SWEEP_SECONDS)

    async def settle(self) -> None:
        """Waits for uploads that are past the point of no return."""
        await asyncio.gather(*self._publishing, return_exceptions=True)

    async def refresh_metrics(self) -> None:
        totals = await self.registry.totals()
        disk_size_bytes, disk_free_bytes = await asyncio.to_thread(self._blobs.disk_usage)
        self._metrics.adapters.set(totals.adapters)
        self._metrics.stored_bytes.set(totals.stored_bytes)
        self._metrics.disk_size_bytes.set(disk_size_bytes)
        self._metrics.disk_free_bytes.set(disk_free_bytes)

    async def _publish(self, staged: StagedAdapter, target: Target) -> tuple[Alias, bool, Admitted]:
        try:
            async with self._admissions:
                admitted = await asyncio.to_thread(admit, staged, self._base)
            async with self._objects, self._volume():
                current = await self.registry.get(target.tenant, target.adapter_id)
                digest = admitted.version.digest
                same = current is not None and current.version.digest == digest
                if same and current is not None and digest not in self._damaged:
                    return current, False, admitted
                if not same:
                    await self._check_quota(target.tenant, current, admitted.version)
                alias = await self._point(staged, target, admitted.version)
        finally:
            await asyncio.to_thread(staged.discard)
        failpoint("after-metadata")
        await self.refresh_metrics()
        return alias, True, admitted

    async def _remove_garbage(self) -> None:
        await self.registry.refresh()
        for digest in await self.registry.garbage():
            if await self.registry.forget(digest):
                await asyncio.to_thread(self._blobs.delete, digest)
                self._damaged.discard(digest)
                _log.info("removed an adapter version", extra={"adapter_version": digest})

    @asynccontextmanager
    async def _volume(self) -> AsyncIterator[None]:
        """While it lasts no other store removes objects. Raises Unavailable when one has been at it for long."""
        deadline = time.monotonic() + _VOLUME_SECONDS
        while (publishing := self._blobs.begin_publish()) is None:
            if time.monotonic() > deadline:
                message = "another adapter store is sweeping the same volume"
                raise Unavailable("VOLUME_BUSY", message, retry_after_seconds=1.0)
            await asyncio.sleep(_VOLUME_RETRY_SECONDS)
        try:
            yield
        finally:
            publishing.close()

    async def _check_quota(self, tenant: str, current: Alias | None, version: Version) -> None:
        """Raises ResourceExhausted when the tenant would have more than it may."""
        policy = self._policy
        if not policy.tenant_max_adapters and not policy.tenant_max_bytes:
            return
        totals = await self.registry.totals(tenant)
        adapters = totals.adapters + (current is None)
        stored_bytes = totals.stored_bytes + version.stored_bytes
        if current is not None:
            stored_bytes -= current.version.stored_bytes
        for what, wanted, limit in (
            ("adapters", adapters, policy.tenant_max_adapters),
            ("bytes", stored_bytes, policy.tenant_max_bytes),
        ):
            if 0 < limit < wanted:
                message = f"the tenant would have {wanted} {what}; its quota is {limit}"
                raise ResourceExhausted(f"QUOTA_{what.upper()}", message, metadata={"limit": str(limit)})

    async def _point(self, staged: StagedAdapter, target: Target, version: Version) -> Alias:
        """Known to the registry, then on disk, then visible: a crash in between leaves garbage that a sweep finds."""
        damaged = version.digest in self._damaged
        await self.registry.add_version(version)
        await asyncio.to_thread(self._blobs.publish, staged, version.digest, damaged=damaged)
        self._damaged.discard(version.digest)
        failpoint("before-metadata")
        expected = None if target.replace else target.expected_version or ABSENT
        try:
            return await self.registry.point(
                target.tenant, target.adapter_id, version.digest, expected=expected, now=self._clock.now()
            )
        except WrongVersionError as error:
            if target.expected_version or error.current is None:
                raise _conflict(target.adapter_id, error.current, target.expected_version) from None
            message = (
                f"adapter {target.adapter_id!r} exists and points to {error.current}; "
                "give expected_version or replace to move it"
            )
            raise AlreadyExists("ADAPTER_ALREADY_EXISTS", message) from None


def _not_found(adapter_id: str) -> NotFound:
    return NotFound("ADAPTER_NOT_FOUND", f"adapter {adapter_id!r} not found")


def _conflict(adapter_id: str, current: str | None, expected: str) -> Conflict:
    now = f"points to {current}" if current else "does not exist"
    wanted = f"not to the expected {expected}" if expected else "and no version was expected"
    return Conflict("ADAPTER_VERSION_CONFLICT", f"adapter {adapter_id!r} {now}, {wanted}")
