"""AdapterStoreService for users: passed on to the store with the verified tenant in place of the one in the request."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import Any, NoReturn, TypeVar

import grpc

from common.errors import PermissionDenied, Unavailable, from_rpc_error
from gateway.directory import AdapterDirectory
from gateway.identity import tenant_of
from loraplex.v1 import adapter_store_pb2, adapter_store_pb2_grpc

RETRY_SECONDS = 1.0

_Response = TypeVar("_Response")
_UploadCall = grpc.aio.StreamUnaryCall[adapter_store_pb2.UploadAdapterRequest, adapter_store_pb2.UploadAdapterResponse]


class AdapterStoreProxy(adapter_store_pb2_grpc.AdapterStoreServiceServicer):
    """The users' one door to the adapter store."""

    def __init__(self, channel: grpc.aio.Channel, directory: AdapterDirectory) -> None:
        """`directory` learns at once what is changed here: who changed it may name it in the next request."""
        self._store = adapter_store_pb2_grpc.AdapterStoreServiceStub(channel)
        self._directory = directory

    async def UploadAdapter(
        self, request_iterator: AsyncIterator[adapter_store_pb2.UploadAdapterRequest], context: Any
    ) -> adapter_store_pb2.UploadAdapterResponse:
        call = self._store.UploadAdapter(timeout=context.time_remaining())
        try:
            await _forward(request_iterator, call, tenant_of(context))
            response = await _answer(call)
            self._directory.learn(response.adapter)
            return response
        finally:
            call.cancel()

    async def GetAdapter(self, request: adapter_store_pb2.GetAdapterRequest, context: Any) -> adapter_store_pb2.Adapter:
        request.tenant = tenant_of(context)
        return await _answer(self._store.GetAdapter(request, timeout=context.time_remaining()))

    async def ListAdapters(
        self, request: adapter_store_pb2.ListAdaptersRequest, context: Any
    ) -> adapter_store_pb2.ListAdaptersResponse:
        request.tenant = tenant_of(context)
        return await _answer(self._store.ListAdapters(request, timeout=context.time_remaining()))

    async def DeleteAdapter(
        self, request: adapter_store_pb2.DeleteAdapterRequest, context: Any
    ) -> adapter_store_pb2.DeleteAdapterResponse:
        request.tenant = tenant_of(context)
        response = await _answer(self._store.DeleteAdapter(request, timeout=context.time_remaining()))
        self._directory.unlearn(request.tenant, request.adapter_id, response.adapter_version)
        return response

    async def SetAlias(self, request: adapter_store_pb2.SetAliasRequest, context: Any) -> adapter_store_pb2.Adapter:
        request.tenant = tenant_of(context)
        adapter = await _answer(self._store.SetAlias(request, timeout=context.time_remaining()))
        self._directory.learn(adapter)
        return adapter

    async def ExportAdapter(
        self, request: adapter_store_pb2.ExportAdapterRequest, context: Any
    ) -> AsyncIterator[adapter_store_pb2.ExportAdapterResponse]:
        request.tenant = tenant_of(context)
        call = self._store.ExportAdapter(request, timeout=context.time_remaining())
        try:
            async for response in call:
                yield response
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, peer="adapter store") from None
        finally:
            call.cancel()

    async def FetchWeights(
        self, request: adapter_store_pb2.FetchWeightsRequest, context: Any
    ) -> AsyncIterator[adapter_store_pb2.FetchWeightsResponse]:
        _refuse("FetchWeights")
        yield adapter_store_pb2.FetchWeightsResponse()

    async def WatchAdapters(
        self, request: adapter_store_pb2.WatchAdaptersRequest, context: Any
    ) -> AsyncIterator[adapter_store_pb2.WatchAdaptersResponse]:
        _refuse("WatchAdapters")
        yield adapter_store_pb2.WatchAdaptersResponse()


async def _forward(
    requests: AsyncIterator[adapter_store_pb2.UploadAdapterRequest], call: _UploadCall, tenant: str
) -> None:
    """One message at a time, so that the store's pace is the client's. Ends early when the store has answered.

    Raises Unavailable when the stream to the store breaks.
    """
    async for request in requests:
        if request.HasField("header"):
            request.header.tenant = tenant
        try:
            await call.write(request)
        except asyncio.InvalidStateError:
            return
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.INTERNAL and not error.trailing_metadata():
                # Not the store's word but grpc's own, for a message that could not be sent.
                message = "the stream to the adapter store broke"
                raise Unavailable("ADAPTER_STORE_UNAVAILABLE", message, retry_after_seconds=RETRY_SECONDS) from None
            return
    await call.done_writing()


async def _answer(call: Awaitable[_Response]) -> _Response:
    """Raises the store's error as ours."""
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error, peer="adapter store") from None


def _refuse(method: str) -> NoReturn:
    raise PermissionDenied("INTERNAL_METHOD", f"{method} is for the services behind the gateway, not for users")
