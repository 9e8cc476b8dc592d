"""MemoryService: the memory manager's face for operators and tools."""

from typing import TYPE_CHECKING

from common.errors import Unimplemented
from gpu_worker.face import Face
from loraplex.v1 import engine_pb2, memory_pb2, memory_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from typing import Any

    import grpc

    Context = grpc.aio.ServicerContext[Any, Any]


class MemoryServicer(memory_pb2_grpc.MemoryServiceServicer):
    """Each call is applied by the engine between two steps."""

    def __init__(self, face: Face) -> None:
        self._face = face

    async def GetUsage(self, request: memory_pb2.GetUsageRequest, context: "Context") -> memory_pb2.GetUsageResponse:
        reply = await self._call(engine_pb2.MemoryCommand(get_usage=engine_pb2.GetUsageCommand()))
        return memory_pb2.GetUsageResponse(
            worker_id=self._face.worker_id,
            memory=reply.memory,
            resident_adapters=len(reply.resident),
            running_sequences=reply.running_sequences,
            waiting_sequences=reply.waiting_sequences,
        )

    async def ListResident(
        self, request: memory_pb2.ListResidentRequest, context: "Context"
    ) -> memory_pb2.ListResidentResponse:
        reply = await self._call(engine_pb2.MemoryCommand(get_usage=engine_pb2.GetUsageCommand()))
        return memory_pb2.ListResidentResponse(adapters=reply.resident)

    async def Pin(self, request: memory_pb2.PinRequest, context: "Context") -> memory_pb2.PinResponse:
        await self._call(engine_pb2.MemoryCommand(pin=_adapter(request.tenant, request.adapter_version)))
        return memory_pb2.PinResponse()

    async def Unpin(self, request: memory_pb2.UnpinRequest, context: "Context") -> memory_pb2.UnpinResponse:
        await self._call(engine_pb2.MemoryCommand(unpin=_adapter(request.tenant, request.adapter_version)))
        return memory_pb2.UnpinResponse()

    async def Evict(self, request: memory_pb2.EvictRequest, context: "Context") -> memory_pb2.EvictResponse:
        reply = await self._call(engine_pb2.MemoryCommand(evict=_adapter(request.tenant, request.adapter_version)))
        return memory_pb2.EvictResponse(freed_pages=reply.freed_pages)

    async def PrefetchAdapter(
        self, request: memory_pb2.PrefetchAdapterRequest, context: "Context"
    ) -> memory_pb2.PrefetchAdapterResponse:
        raise Unimplemented("PREFETCH_UNIMPLEMENTED", "this release loads an adapter with its first request")

    async def WatchResidency(
        self, request: memory_pb2.WatchResidencyRequest, context: "Context"
    ) -> "AsyncIterator[memory_pb2.WatchResidencyResponse]":
        raise Unimplemented("WATCH_RESIDENCY_UNIMPLEMENTED", "this release answers ListResident only")
        yield  # makes this an async generator, as grpc.aio expects of a streaming method

    async def _call(self, command: engine_pb2.MemoryCommand) -> engine_pb2.MemoryReply:
        return await self._face.call_memory(command)


def _adapter(tenant: str, adapter_version: str) -> engine_pb2.AdapterCommand:
    return engine_pb2.AdapterCommand(tenant=tenant, adapter_version=adapter_version)
