"""One adapter on its way from the store: what has come so far survives a broken call."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import BinaryIO

import grpc

from common.checksum import Checksum
from common.errors import DataLoss, Unavailable, from_rpc_error
from gpu_worker.blob_cache import BlobCache, Partial
from loraplex.v1 import adapter_store_pb2, adapter_store_pb2_grpc, engine_pb2, types_pb2

FETCH_SECONDS = 600.0
# A store that sends nothing for so long is taken for dead, however alive its connection is.
SILENCE_SECONDS = 3.0


class Download:
    """The bytes received, written beside their final place and hashed as they come."""

    def __init__(self, needed: engine_pb2.AdapterNeeded) -> None:
        self.needed = needed
        self.layout = types_pb2.PackedLayout()
        self.partial: Partial | None = None
        self.received = 0
        self.started = time.monotonic()
        self._checksum: Checksum | None = None
        self._file: BinaryIO | None = None

    @property
    def holds(self) -> bool:
        """What has come is all and nothing but what the layout promises."""
        return (self._checksum or Checksum(self.layout)).holds()

    def take(self, layout: types_pb2.PackedLayout) -> None:
        """The layout of a call. Raises DataLoss when it is another than that of the call before."""
        if self.received and layout != self.layout:
            raise DataLoss("ADAPTER_CORRUPT", "the adapter store promises other bytes than it did a moment ago")
        self.layout = layout

    def write(self, data: bytes) -> None:
        """Appends; all of `data` or nothing. Raises OSError."""
        assert self.partial is not None
        if self._file is None:
            self._file = self.partial.path.open("wb", buffering=0)
        self._file.seek(self.received)
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]
        if self._checksum is None:
            self._checksum = Checksum(self.layout)
        self._checksum.update(data)
        self.received += len(data)

    def close(self, cache: BlobCache) -> None:
        """Gives back the bytes set aside; a file that was kept stays."""
        if self._file is not None:
            self._file.close()
        if self.partial is not None:
            cache.abandon(self.partial)


@asynccontextmanager
async def receive(
    store: "adapter_store_pb2_grpc.AdapterStoreServiceAsyncStub", download: Download
) -> AsyncIterator[AsyncIterator[bytes]]:
    """A call for the bytes from `download.received` on; its layout has been taken when the body runs.

    Raises LoraplexError: that of the store, or Unavailable when it falls silent.
    """
    request = adapter_store_pb2.FetchWeightsRequest(
        tenant=download.needed.tenant,
        adapter_version=download.needed.adapter_version,
        offset_bytes=download.received,
    )
    call = store.FetchWeights(request, timeout=FETCH_SECONDS)
    messages = aiter(call)

    async def next_message() -> adapter_store_pb2.FetchWeightsResponse | None:
        try:
            async with _patience():
                return await anext(messages, None)
        except grpc.RpcError as error:
            raise from_rpc_error(error, peer="adapter store") from None

    async def chunks() -> AsyncIterator[bytes]:
        while (message := await next_message()) is not None:
            if message.chunk.offset_bytes != download.received:
                where = f"byte {message.chunk.offset_bytes} where {download.received} was due"
                raise DataLoss("ADAPTER_CORRUPT", f"the adapter store sent {where}")
            yield message.chunk.data

    try:
        first = await next_message()
        if first is None or not first.HasField("layout"):
            raise DataLoss("ADAPTER_CORRUPT", "the adapter store sent no layout")
        download.take(first.layout)
        yield chunks()
    finally:
        call.cancel()


@asynccontextmanager
async def _patience() -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(SILENCE_SECONDS):
            yield
    except TimeoutError:
        message = f"the adapter store sent nothing for {SILENCE_SECONDS:g} s"
        raise Unavailable("STORE_SILENT", message, retry_after_seconds=1.0) from None
