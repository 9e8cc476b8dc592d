"""Store → host: fetches packed adapters into a cache folder, a few at a time, each digest once."""

import asyncio
import hashlib
import logging
import re
import stat
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import grpc

from common.channel import connect
from common.errors import DataLoss, LoraplexError, from_rpc_error, to_proto
from common.wire import dtype_from_proto
from gpu_worker.metrics import WorkerMetrics
from loraplex.v1 import adapter_store_pb2, adapter_store_pb2_grpc, engine_pb2, types_pb2

_log = logging.getLogger(__name__)

# More would only share the same disk and network, and delay whichever is needed first.
PARALLEL_FETCHES = 4
FETCH_SECONDS = 60.0
_DIGEST = re.compile(r"[0-9a-f]{64}")


class Fetcher:
    """Answers each AdapterNeeded with AdapterFetched or AdapterFetchFailed."""

    def __init__(
        self,
        adapter_store: str,
        cache_dir: Path,
        metrics: WorkerMetrics,
        reply: Callable[[engine_pb2.EngineCommand], None],
        store_volume: Path | None = None,
    ) -> None:
        """With a `store_volume` adapters are read where they lie; whoever copies them verifies what it copied."""
        self._channel = connect(adapter_store)
        self._store = adapter_store_pb2_grpc.AdapterStoreServiceStub(self._channel)
        self._cache_dir = cache_dir
        self._store_volume = store_volume
        self._metrics = metrics
        self._reply = reply
        self._slots = asyncio.Semaphore(PARALLEL_FETCHES)
        self._tasks: set[asyncio.Task[None]] = set()
        cache_dir.mkdir(parents=True, exist_ok=True)

    def fetch(self, needed: engine_pb2.AdapterNeeded) -> None:
        """Starts fetching; the engine asks once for each digest it does not have."""
        task = asyncio.create_task(self._answer(needed))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await self._channel.close()

    async def _answer(self, needed: engine_pb2.AdapterNeeded) -> None:
        started = time.monotonic()
        try:
            async with self._slots:
                path, layout = await self._fetch(needed)
        except LoraplexError as error:
            _log.warning("adapter %s was not fetched: %s", needed.adapter_version, error.message)
            self._metrics.load_failed(error.reason)
            failed = engine_pb2.AdapterFetchFailed(
                tenant=needed.tenant, adapter_version=needed.adapter_version, error=to_proto(error)
            )
            self._reply(engine_pb2.EngineCommand(adapter_fetch_failed=failed))
            return
        self._metrics.fetched(time.monotonic() - started)
        fetched = engine_pb2.AdapterFetched(
            tenant=needed.tenant, adapter_version=needed.adapter_version, path=str(path), layout=layout
        )
        self._reply(engine_pb2.EngineCommand(adapter_fetched=fetched))

    async def _fetch(self, needed: engine_pb2.AdapterNeeded) -> tuple[Path, types_pb2.PackedLayout]:
        """Raises LoraplexError when the store does not have it, is away, or sends other bytes than it promised."""
        request = adapter_store_pb2.FetchWeightsRequest(tenant=needed.tenant, adapter_version=needed.adapter_version)
        call = self._store.FetchWeights(request, timeout=FETCH_SECONDS)
        try:
            first = await anext(aiter(call), None)
            if first is None or not first.HasField("layout"):
                raise DataLoss("ADAPTER_CORRUPT", "the adapter store sent no layout")
            if (path := self._on_volume(needed.adapter_version, first.layout)) is not None:
                return path, first.layout
            path = self._cache_dir / f"{first.layout.sha256}.packed"
            if await asyncio.to_thread(_has_sha256, path, first.layout.sha256):
                return path, first.layout
            await self._download(call, path, first.layout)
            return path, first.layout
        except grpc.RpcError as error:
            raise from_rpc_error(error, peer="adapter store") from None
        except OSError as error:
            raise DataLoss("CACHE_WRITE_FAILED", f"the adapter cannot be cached: {error.strerror}") from None
        finally:
            call.cancel()

    def _on_volume(self, adapter_version: str, layout: types_pb2.PackedLayout) -> Path | None:
        """The packed string inside the store's own folder; None when this process does not see it there."""
        if self._store_volume is None or not _DIGEST.fullmatch(adapter_version):
            return None
        path = self._store_volume / "objects" / adapter_version / f"packed.{dtype_from_proto(layout.dtype)}"
        try:
            found = path.lstat()
        except OSError:
            return None
        return path if stat.S_ISREG(found.st_mode) and found.st_size == layout.total_bytes else None

    async def _download(
        self,
        call: "grpc.aio.UnaryStreamCall[adapter_store_pb2.FetchWeightsRequest, adapter_store_pb2.FetchWeightsResponse]",
        path: Path,
        layout: types_pb2.PackedLayout,
    ) -> None:
        """Writes the chunks beside `path`, verifies them, and renames: a reader never sees half a file."""
        # Two versions may have the same bytes, and two workers the same folder.
        digest, partial, received = hashlib.sha256(), path.with_suffix(f".{uuid.uuid4().hex}.partial"), 0
        try:
            with partial.open("wb") as file:
                async for message in call:
                    digest.update(message.chunk.data)
                    file.write(message.chunk.data)
                    received += len(message.chunk.data)
            if digest.hexdigest() != layout.sha256:
                came = f"{received} of {layout.total_bytes} bytes"
                raise DataLoss("ADAPTER_CORRUPT", f"{came} came, and their sha256 is not the promised one")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def _has_sha256(path: Path, sha256: str) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256
