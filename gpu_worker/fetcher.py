"""Store → host: fetches packed adapters into the cache folder, a few at a time, each digest once."""

import asyncio
import errno
import logging
import re
import stat
import time
from collections.abc import Callable
from pathlib import Path

from common.channel import connect
from common.errors import DataLoss, LoraplexError, ResourceExhausted, Unavailable, to_proto
from common.tls import PemFiles
from common.wire import dtype_from_proto
from gpu_worker.blob_cache import BlobCache
from gpu_worker.download import Download, receive
from gpu_worker.metrics import WorkerMetrics
from gpu_worker.refusals import Refusals
from loraplex.v1 import adapter_store_pb2_grpc, engine_pb2, types_pb2

_log = logging.getLogger(__name__)

# More would only share the same disk and network, and delay whichever is needed first.
PARALLEL_FETCHES = 4
# A store that is away gets this long from the last byte on; whoever waits for the adapter hears of it within a second.
RETRY_SECONDS = 0.8
FIRST_DELAY_SECONDS = 0.1
MAX_DISTRUSTED = 4096
_DIGEST = re.compile(r"[0-9a-f]{64}")
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

_Key = tuple[str, str]


class _CutShort(Exception):
    """The store ended a stream before its end: worth asking for the rest, and a bad adapter when none comes."""


class Fetcher:
    """Answers each AdapterNeeded with AdapterFetched or AdapterFetchFailed."""

    def __init__(
        self,
        adapter_store: str,
        cache: BlobCache,
        metrics: WorkerMetrics,
        reply: Callable[[engine_pb2.EngineCommand], None],
        store_volume: Path | None = None,
        tls: PemFiles | None = None,
    ) -> None:
        """With a `store_volume` adapters are read where they lie; whoever copies them verifies what it copied."""
        self._channel = connect(adapter_store, tls=tls)
        self._store = adapter_store_pb2_grpc.AdapterStoreServiceStub(self._channel)
        self._cache = cache
        self._store_volume = store_volume
        self._metrics = metrics
        self._reply = reply
        self._slots = asyncio.Semaphore(PARALLEL_FETCHES)
        self._flights: dict[_Key, asyncio.Task[None]] = {}
        self._refusals = Refusals()
        # version -> sha256 of a file that the engine was told of and has not opened yet
        self._handed_out: dict[str, str] = {}
        # Versions whose bytes on the store's volume were wrong: the store itself is asked for them.
        self._distrusted: set[str] = set()

    def fetch(self, needed: engine_pb2.AdapterNeeded) -> None:
        """Starts fetching, unless it is under way: then its answer counts for this question too."""
        key = (needed.tenant, needed.adapter_version)
        if key in self._flights:
            return
        self._flights[key] = asyncio.create_task(self._answer(needed))

    def settled(self, adapter_version: str) -> None:
        """The engine has opened the file, or refused it: its name may go."""
        if (sha256 := self._handed_out.pop(adapter_version, None)) is not None:
            self._cache.release(sha256)

    def distrust(self, adapter_version: str, sha256: str) -> None:
        """The engine found other bytes than promised: the next fetch starts anew."""
        if len(self._distrusted) == MAX_DISTRUSTED:
            self._distrusted.clear()
        self._distrusted.add(adapter_version)
        self._cache.discard(sha256)

    def engine_lost(self) -> None:
        """Nobody opens the files any more that were handed out."""
        for adapter_version in list(self._handed_out):
            self.settled(adapter_version)

    async def close(self) -> None:
        flights = list(self._flights.values())
        for task in flights:
            task.cancel()
        await asyncio.gather(*flights, return_exceptions=True)
        await self._channel.close()

    async def _answer(self, needed: engine_pb2.AdapterNeeded) -> None:
        try:
            answer = await self._ask(needed)
        finally:
            # Before anybody hears of it: who asks again must not be taken for the same question.
            del self._flights[needed.tenant, needed.adapter_version]
        self._reply(answer)

    async def _ask(self, needed: engine_pb2.AdapterNeeded) -> engine_pb2.EngineCommand:
        started, version = time.monotonic(), needed.adapter_version
        try:
            async with self._slots:
                path, layout = await self._fetch_or_refuse(needed)
        except LoraplexError as error:
            _log.warning("adapter %s was not fetched: %s", version, error.message)
            self._metrics.load_failed(error.reason)
            failed = engine_pb2.AdapterFetchFailed(tenant=needed.tenant, adapter_version=version, error=to_proto(error))
            return engine_pb2.EngineCommand(adapter_fetch_failed=failed)
        self._metrics.fetched(time.monotonic() - started)
        fetched = engine_pb2.AdapterFetched(
            tenant=needed.tenant, adapter_version=version, path=str(path), layout=layout
        )
        return engine_pb2.EngineCommand(adapter_fetched=fetched)

    async def _fetch_or_refuse(self, needed: engine_pb2.AdapterNeeded) -> tuple[Path, types_pb2.PackedLayout]:
        """Raises LoraplexError, for a while without asking the store again."""
        tenant, version = needed.tenant, needed.adapter_version
        if (refusal := self._refusals.find(tenant, version, time.monotonic())) is not None:
            raise refusal
        try:
            return await self._fetch(needed)
        except LoraplexError as error:
            self._refusals.note(tenant, version, error, time.monotonic())
            raise

    async def _fetch(self, needed: engine_pb2.AdapterNeeded) -> tuple[Path, types_pb2.PackedLayout]:
        """Tries until it is here, the store has been silent for too long, or trying again cannot help.

        Raises LoraplexError when the store does not have it, is away, or sends other bytes than it promised.
        """
        download, delay, received = Download(needed), FIRST_DELAY_SECONDS, 0
        give_up = time.monotonic() + RETRY_SECONDS
        try:
            while True:
                try:
                    return await self._attempt(download)
                except (Unavailable, _CutShort) as error:
                    now = time.monotonic()
                    if download.received > received:
                        received, delay, give_up = download.received, FIRST_DELAY_SECONDS, now + RETRY_SECONDS
                    if now + delay > give_up:
                        corrupt = DataLoss("ADAPTER_CORRUPT", str(error))
                        raise (error if isinstance(error, Unavailable) else corrupt) from None
                await asyncio.sleep(delay)
                delay *= 2
        except OSError as error:
            raise _cannot_cache(error) from None
        finally:
            download.close(self._cache)

    async def _attempt(self, download: Download) -> tuple[Path, types_pb2.PackedLayout]:
        """One call to the store, from where the last one broke. Raises LoraplexError or OSError."""
        version = download.needed.adapter_version
        async with receive(self._store, download) as chunks:
            layout = download.layout
            if (path := self._on_volume(version, layout)) is not None:
                return path, layout
            if not download.received and (path := await self._cache.find(layout)) is not None:
                return self._hand_out(version, layout, path)
            if download.partial is None:
                download.partial = await self._cache.reserve(layout.sha256, layout.total_bytes)
            async for data in chunks:
                self._write(download, data)
        if download.received < layout.total_bytes:
            came = f"{download.received} of {layout.total_bytes} bytes came"
            raise _CutShort(f"{came}, then the adapter store ended the stream")
        if not download.holds:
            came = f"{download.received} of {layout.total_bytes} bytes came"
            raise DataLoss("ADAPTER_CORRUPT", f"{came}, and their checksum is not the promised one")
        assert download.partial is not None
        path = self._cache.keep(download.partial, time.monotonic() - download.started)
        return self._hand_out(version, layout, path)

    def _write(self, download: Download, data: bytes) -> None:
        """A full disk costs files worth less than this one, once for each chunk. Raises OSError."""
        try:
            download.write(data)
        except OSError as error:
            if error.errno not in _DISK_FULL or not self._cache.shrink(download.layout.total_bytes):
                raise
            download.write(data)

    def _hand_out(
        self, version: str, layout: types_pb2.PackedLayout, path: Path
    ) -> tuple[Path, types_pb2.PackedLayout]:
        self.settled(version)
        self._handed_out[version] = layout.sha256
        return path, layout

    def _on_volume(self, adapter_version: str, layout: types_pb2.PackedLayout) -> Path | None:
        """The packed string inside the store's own folder; None when this process does not see it there."""
        if self._store_volume is None or not _DIGEST.fullmatch(adapter_version) or adapter_version in self._distrusted:
            return None
        path = self._store_volume / "objects" / adapter_version / f"packed.{dtype_from_proto(layout.dtype)}"
        try:
            found = path.lstat()
        except OSError:
            return None
        return path if stat.S_ISREG(found.st_mode) and found.st_size == layout.total_bytes else None


def _cannot_cache(error: OSError) -> LoraplexError:
    if error.errno in _DISK_FULL:
        message = "the worker's disk is full and nothing in its cache may go; another worker may have room"
        return ResourceExhausted("CACHE_DISK_FULL", message, retry_after_seconds=5.0)
    return DataLoss("CACHE_WRITE_FAILED", f"the adapter cannot be cached: {error.strerror}")
