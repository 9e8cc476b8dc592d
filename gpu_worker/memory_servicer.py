"""MemoryService: the memory manager's face for operators and tools."""

from typing import TYPE_CHECKING

from common.errors import InvalidArgument
from gpu_worker.engine_process import engine_lost
from gpu_worker.face import Face
from loraplex.v1 import engine_pb2, memory_pb2, memory_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from typing import Any

    import grpc

    Context = grpc.aio.ServicerContext[Any, Any]


class MemoryServicer(memory_pb2_grpc.MemoryServiceServicer):
    """Each call is applied by the engine between two steps; watchers read the face's copy."""

    def __init__(self, face: Face) -> None:
        self._face = face

    async def GetUsage(self, request: memory_pb2.GetUsageRequest, context: "Context") -> memory_pb2.GetUsageResponse:
        reply = await self._call(engine_pb2.MemoryCommand(get_usage=engine_pb2.GetUsageCommand()))
        return memory_pb2.GetUsageResponse(
            worker_id=self._face.worker_id,
            memory=reply.memory,
            resident_adapters=reply.resident_adapters,
            running_sequences=reply.running_sequences,
            waiting_sequences=reply.waiting_sequences,
            cache_bytes=self._face.cache.used_bytes,
            cache_limit_bytes=self._face.cache.limit_bytes,
            cached_adapters=len(self._face.cache),
        )

    async def ListResident(
        self, request: memory_pb2.ListResidentRequest, context: "Context"
    ) -> memory_pb2.ListResidentResponse:
        reply = await self._call(engine_pb2.MemoryCommand(list_resident=engine_pb2.ListResidentCommand()))
        return memory_pb2.ListResidentResponse(adapters=reply.resident)

    async def Pin(self, request: memory_pb2.PinRequest, context: "Context") -> memory_pb2.PinResponse:
        await self._call(engine_pb2.MemoryCommand(pin=_adapter(request)))
        return memory_pb2.PinResponse()

    async def Unpin(self, request: memory_pb2.UnpinRequest, context: "Context") -> memory_pb2.UnpinResponse:
        await self._call(engine_pb2.MemoryCommand(unpin=_adapter(request)))
        return memory_pb2.UnpinResponse()

    async def Evict(self, request: memory_pb2.EvictRequest, context: "Context") -> memory_pb2.EvictResponse:
        reply = await self._call(engine_pb2.MemoryCommand(evict=_adapter(request)))
        return memory_pb2.EvictResponse(freed_pages=reply.freed_pages)

    async def PrefetchAdapter(
        self, request: memory_pb2.PrefetchAdapterRequest, context: "Context"
    ) -> memory_pb2.PrefetchAdapterResponse:
        await self._call(engine_pb2.MemoryCommand(prefetch=_adapter(request)))
        return memory_pb2.PrefetchAdapterResponse()

    async def WatchResidency(
        self, request: memory_pb2.WatchResidencyRequest, context: "Context"
    ) -> "AsyncIterator[memory_pb2.WatchResidencyResponse]":
        if self._face.ready is None:
            raise engine_lost()
        async for response in self._face.residency.watch():
            yield response

    async def _call(self, command: engine_pb2.MemoryCommand) -> engine_pb2.MemoryReply:
        return await self._face.call_memory(command)


_AdapterRequest = (
    memory_pb2.PinRequest | memory_pb2.UnpinRequest | memory_pb2.EvictRequest | memory_pb2.PrefetchAdapterRequest
)


def _adapter(request: _AdapterRequest) -> engine_pb2.AdapterCommand:
    """Raises InvalidArgument when no adapter is named."""
    if not request.adapter_version:
        raise InvalidArgument("ADAPTER_VERSION_MISSING", "adapter_version is empty", field="adapter_version")
    return engine_pb2.AdapterCommand(tenant=request.tenant, adapter_version=request.adapter_version)
