"""A clock that a test moves, and a client that speaks in the store's own errors."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

import grpc
import numpy as np
import numpy.typing as npt

from adapter_store.blobs import CHAT_TEMPLATE, CONFIG, WEIGHTS
from common.errors import from_rpc_error
from loraplex.v1 import adapter_store_pb2 as pb
from loraplex.v1 import adapter_store_pb2_grpc, types_pb2

TENANT = "acme"
FILES = {
    CONFIG: pb.ADAPTER_FILE_CONFIG,
    WEIGHTS: pb.ADAPTER_FILE_WEIGHTS,
    CHAT_TEMPLATE: pb.ADAPTER_FILE_CHAT_TEMPLATE,
}
MIB = 1024 * 1024


class FakeClock:
    """Stands still until a test advances it; `sleeping` is set while somebody sleeps."""

    def __init__(self) -> None:
        self.seconds = 1_000_000.0
        self.sleeping = asyncio.Event()
        self._sleepers: list[tuple[float, asyncio.Event]] = []

    def now(self) -> float:
        return self.seconds

    async def sleep(self, seconds: float) -> None:
        woken = asyncio.Event()
        self._sleepers.append((self.seconds + seconds, woken))
        self.sleeping.set()
        await woken.wait()

    def advance(self, seconds: float) -> None:
        """Wakes whoever is due; `sleeping` is cleared first, to be awaited for the next round."""
        self.seconds += seconds
        self.sleeping.clear()
        for due, woken in self._sleepers:
            if due <= self.seconds:
                woken.set()


@dataclass(frozen=True)
class Fetched:
    """What FetchWeights streamed, from the first chunk on."""

    layout: types_pb2.PackedLayout
    data: npt.NDArray[np.uint8]
    chunks: list[pb.FetchWeightsChunk]


class StoreClient:
    """Calls a store as its tenant unless told otherwise; raises the store's errors as LoraplexError."""

    def __init__(self, channel: grpc.aio.Channel, tenant: str = TENANT) -> None:
        self.tenant = tenant
        self.stub = adapter_store_pb2_grpc.AdapterStoreServiceStub(channel)

    def _own(self, tenant: str | None) -> str:
        return self.tenant if tenant is None else tenant

    async def upload(
        self,
        adapter_id: str,
        files: Mapping[str, bytes],
        *,
        tenant: str | None = None,
        expected_version: str = "",
        replace: bool = False,
    ) -> pb.UploadAdapterResponse:
        header = pb.UploadHeader(
            tenant=self._own(tenant), adapter_id=adapter_id, expected_version=expected_version, replace=replace
        )
        requests = [pb.UploadAdapterRequest(header=header)]
        for name, data in files.items():
            for start in range(0, len(data), MIB):
                chunk = pb.UploadChunk(file=FILES[name], data=data[start : start + MIB])
                requests.append(pb.UploadAdapterRequest(chunk=chunk))
        return await self.upload_requests(requests)

    async def upload_requests(self, requests: list[pb.UploadAdapterRequest]) -> pb.UploadAdapterResponse:
        try:
            return await self.stub.UploadAdapter(iter(requests))
        except grpc.RpcError as error:
            raise from_rpc_error(error, peer="adapter store") from None

    async def get(self, adapter_id: str, version: str = "", *, tenant: str | None = None) -> pb.Adapter:
        request = pb.GetAdapterRequest(tenant=self._own(tenant), adapter_id=adapter_id, adapter_version=version)
        try:
            return await self.stub.GetAdapter(request)
        except grpc.RpcError as error:
            raise from_rpc_error(error, peer="adapter store") from None

    async def page(self, size: int = 0, token: str = "", *, tenant: str | None = None) -> pb.ListAdaptersResponse:
        request = pb.ListAdaptersRequest(tenant=self._own(tenant), page_size=size, page_token=token)
        try:
            return await self.stub.ListAdapters(request)
        except grpc.RpcError as error:
            raise from_rpc_error(error, peer="adapter store") from None

    async def delete(self, adapter_id: str, *, expected_version: str = "", tenant: str | None = None) -> str:
        request = pb.DeleteAdapterRequest(
            tenant=self._own(tenant), adapter_id=adapter_id, expected_version=expected_version
        )
        try:
            return (await self.stub.DeleteAdapter(request)).adapter_version
        except grpc.RpcError as error:
            raise from_rpc_error(error, peer="adapter store") from None

    async def set_alias(
        self, adapter_id: str, version: str, *, expected_version: str = "", tenant: str | None = None
    ) -> pb.Adapter:
        request = pb.SetAliasRequest(
            tenant=self._own(tenant), adapter_id=adapter_id, expected_version=expected_version, adapter_version=version
        )
        try:
            return await self.stub.SetAlias(request)
        except grpc.RpcError as error:
            raise from_rpc_error(error, peer="adapter store") from None

    async def fetch(
        self,
        version: str,
        *,
        tenant: str | None = None,
        offset_bytes: int = 0,
        dtype: "types_pb2.Dtype.ValueType" = types_pb2.DTYPE_UNSPECIFIED,
        tp_size: int = 0,
        tp_rank: int = 0,
    ) -> Fetched:
        request = pb.FetchWeightsRequest(
            tenant=self._own(tenant),
            adapter_version=version,
            dtype=dtype,
            tp_size=tp_size,
            tp_rank=tp_rank,
            offset_bytes=offset_bytes,
        )
        try:
            responses = [response async for response in self.stub.FetchWeights(request)]
        except grpc.RpcError as error:
            raise from_rpc_error(error, peer="adapter store") from None
        chunks = [response.chunk for response in responses[1:]]
        data = np.frombuffer(b"".join(chunk.data for chunk in chunks), dtype=np.uint8)
        return Fetched(responses[0].layout, data, chunks)

    async def export(
        self, adapter_id: str, version: str = "", *, tenant: str | None = None
    ) -> tuple[pb.Adapter, dict[str, bytes]]:
        request = pb.ExportAdapterRequest(tenant=self._own(tenant), adapter_id=adapter_id, adapter_version=version)
        names = {kind: name for name, kind in FILES.items()}
        files: dict[str, bytes] = {}
        try:
            first, *rest = [response async for response in self.stub.ExportAdapter(request)]
        except grpc.RpcError as error:
            raise from_rpc_error(error, peer="adapter store") from None
        for response in rest:
            name = names[response.chunk.file]
            files[name] = files.get(name, b"") + response.chunk.data
        return first.adapter, files

    async def watch(self, *, tenant: str | None = None, after: int = 0) -> AsyncIterator[pb.WatchAdaptersResponse]:
        """Responses until the caller stops; closing the iterator cancels the call."""
        call = self.stub.WatchAdapters(pb.WatchAdaptersRequest(tenant=self._own(tenant), after_sequence=after))
        try:
            async for response in call:
                yield response
        except grpc.RpcError as error:
            raise from_rpc_error(error, peer="adapter store") from None
        finally:
            call.cancel()
