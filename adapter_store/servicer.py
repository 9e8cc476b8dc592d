"""The handlers of AdapterStoreService: check the request, call the store, map the answer, return."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc

from adapter_store.convert import adapter_to_proto, changes_to_proto, page_to_proto
from adapter_store.metrics import StoreMetrics
from adapter_store.names import check_adapter_id, check_digest, check_tenant
from adapter_store.packed_reader import PackedReader
from adapter_store.store import AdapterStore
from adapter_store.upload import read_target, receive
from common.errors import InvalidArgument, LoraplexError
from common.wire import dtype_from_proto
from loraplex.v1 import adapter_store_pb2 as pb
from loraplex.v1 import adapter_store_pb2_grpc, types_pb2

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000
FETCH_CHUNK_BYTES = 1024 * 1024
MAX_TP_SIZE = 64

_Context = grpc.aio.ServicerContext[Any, Any]


class AdapterStoreServicer(adapter_store_pb2_grpc.AdapterStoreServiceServicer):
    """Holds no state of its own."""

    def __init__(self, store: AdapterStore, metrics: StoreMetrics) -> None:
        self._store = store
        self._metrics = metrics

    async def UploadAdapter(
        self, request_iterator: AsyncIterator[pb.UploadAdapterRequest], context: _Context
    ) -> pb.UploadAdapterResponse:
        try:
            response = await self._upload(request_iterator)
        except LoraplexError as error:
            self._metrics.uploads.labels("rejected", error.reason).inc()
            raise
        self._metrics.uploads.labels("ok" if response.created else "duplicate", "").inc()
        return response

    async def _upload(self, requests: AsyncIterator[pb.UploadAdapterRequest]) -> pb.UploadAdapterResponse:
        target = await read_target(requests)
        self._store.registry.check_writable()
        staged = self._store.stage()
        try:
            await receive(requests, staged)
        except BaseException:
            await asyncio.shield(asyncio.to_thread(staged.discard))
            raise
        alias, created, admitted = await self._store.publish(staged, target)
        return pb.UploadAdapterResponse(adapter=adapter_to_proto(alias), created=created, warnings=admitted.warnings)

    async def GetAdapter(self, request: pb.GetAdapterRequest, context: _Context) -> pb.Adapter:
        check_tenant(request.tenant)
        check_adapter_id(request.adapter_id)
        if request.adapter_version:
            check_digest(request.adapter_version)
        return adapter_to_proto(await self._store.get(request.tenant, request.adapter_id, request.adapter_version))

    async def ListAdapters(self, request: pb.ListAdaptersRequest, context: _Context) -> pb.ListAdaptersResponse:
        check_tenant(request.tenant)
        if request.page_size > MAX_PAGE_SIZE:
            message = f"page_size must be at most {MAX_PAGE_SIZE}; it is {request.page_size}"
            raise InvalidArgument("PAGE_SIZE_INVALID", message, field="page_size")
        if request.page_token:
            check_adapter_id(request.page_token, "page_token")
        page_size = request.page_size or DEFAULT_PAGE_SIZE
        aliases = await self._store.registry.page(request.tenant, after=request.page_token, limit=page_size + 1)
        return page_to_proto(aliases, page_size)

    async def DeleteAdapter(self, request: pb.DeleteAdapterRequest, context: _Context) -> pb.DeleteAdapterResponse:
        check_tenant(request.tenant)
        check_adapter_id(request.adapter_id)
        if request.expected_version:
            check_digest(request.expected_version, "expected_version")
        digest = await self._store.delete(request.tenant, request.adapter_id, request.expected_version)
        return pb.DeleteAdapterResponse(adapter_version=digest)

    async def SetAlias(self, request: pb.SetAliasRequest, context: _Context) -> pb.Adapter:
        check_tenant(request.tenant)
        check_adapter_id(request.adapter_id)
        check_digest(request.adapter_version)
        if request.expected_version:
            check_digest(request.expected_version, "expected_version")
        alias = await self._store.set_alias(
            request.tenant, request.adapter_id, request.expected_version, request.adapter_version
        )
        return adapter_to_proto(alias)

    async def ExportAdapter(
        self, request: pb.ExportAdapterRequest, context: _Context
    ) -> AsyncIterator[pb.ExportAdapterResponse]:
        check_tenant(request.tenant)
        check_adapter_id(request.adapter_id)
        if request.adapter_version:
            check_digest(request.adapter_version)
        alias = await self._store.get(request.tenant, request.adapter_id, request.adapter_version)
        yield pb.ExportAdapterResponse(adapter=adapter_to_proto(alias))
        chunks = self._store.export(alias.version)
        while (chunk := await asyncio.to_thread(next, chunks, None)) is not None:
            yield pb.ExportAdapterResponse(chunk=chunk)

    async def FetchWeights(
        self, request: pb.FetchWeightsRequest, context: _Context
    ) -> AsyncIterator[pb.FetchWeightsResponse]:
        check_tenant(request.tenant)
        check_digest(request.adapter_version)
        _check_shard(request)
        started, result, sent_bytes = time.monotonic(), "broken", 0
        reader = await self._store.open_packed(
            request.tenant, request.adapter_version, _dtype(request), request.tp_rank, request.tp_size
        )
        try:
            total_bytes = reader.layout.total_bytes
            if request.offset_bytes > total_bytes:
                message = f"offset_bytes is {request.offset_bytes}; the packed string has {total_bytes} bytes"
                raise InvalidArgument("OFFSET_INVALID", message, field="offset_bytes")
            yield pb.FetchWeightsResponse(layout=reader.layout)
            async with aclosing(_read_ahead(reader, request.offset_bytes)) as chunks:
                async for offset, data in chunks:
                    last = offset + len(data) == total_bytes
                    if last and not reader.is_intact():
                        # Without its end nobody takes it for whole.
                        raise self._store.found_damaged(request.adapter_version)
                    yield pb.FetchWeightsResponse(chunk=pb.FetchWeightsChunk(offset_bytes=offset, data=data))
                    sent_bytes += len(data)
            result = "ok"
        finally:
            reader.close()
            self._metrics.fetch_seconds.labels(result).observe(time.monotonic() - started)
            self._metrics.fetch_bytes.labels(result).inc(sent_bytes)

    async def WatchAdapters(
        self, request: pb.WatchAdaptersRequest, context: _Context
    ) -> AsyncIterator[pb.WatchAdaptersResponse]:
        if request.tenant:
            check_tenant(request.tenant)
        through, caught_up = request.after_sequence, False
        while True:
            found = await self._store.registry.changes(request.tenant, through)
            for response in changes_to_proto(found):
                yield response
            if found.resync or not caught_up:
                caught_up = True
                yield pb.WatchAdaptersResponse(caught_up=True)
            through = found.through
            await self._store.registry.wait(through)


async def _read_ahead(reader: PackedReader, start: int) -> AsyncGenerator[tuple[int, bytes], None]:
    """(offset, chunk) to the end; while one is being sent the next is read and hashed."""
    loop, ahead = asyncio.get_running_loop(), None
    offsets = range(start, reader.layout.total_bytes, FETCH_CHUNK_BYTES)
    try:
        for offset in offsets:
            data = await (ahead or loop.run_in_executor(None, _read_and_hash, reader, offset))
            following, ahead = offset + FETCH_CHUNK_BYTES, None
            if following in offsets:
                ahead = loop.run_in_executor(None, _read_and_hash, reader, following)
            yield offset, data
    finally:
        if ahead is not None:
            # The reader must not be closed under its thread.
            await asyncio.wait([ahead])


def _read_and_hash(reader: PackedReader, offset_bytes: int) -> bytes:
    data = reader.read(offset_bytes, FETCH_CHUNK_BYTES)
    reader.hash(offset_bytes, data)
    return data


def _check_shard(request: pb.FetchWeightsRequest) -> None:
    if request.tp_size > MAX_TP_SIZE:
        message = f"tp_size is {request.tp_size}; the limit is {MAX_TP_SIZE}"
        raise InvalidArgument("TP_SIZE_INVALID", message, field="tp_size")
    if request.tp_rank >= max(1, request.tp_size):
        message = f"tp_rank is {request.tp_rank}; it must be below tp_size"
        raise InvalidArgument("TP_RANK_INVALID", message, field="tp_rank")


def _dtype(request: pb.FetchWeightsRequest) -> str:
    """Empty for the adapter's own."""
    if request.dtype == types_pb2.DTYPE_UNSPECIFIED:
        return ""
    try:
        return dtype_from_proto(request.dtype)
    except KeyError:
        message = f"dtype {int(request.dtype)} is unknown"
        raise InvalidArgument("DTYPE_INVALID", message, field="dtype") from None
