"""The services around a worker, a few lines each, on real sockets."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from common.errors import NotFound, Unavailable
from common.interceptors import ErrorInterceptor
from common.wire import layout_to_proto
from loraplex.v1 import adapter_store_pb2, adapter_store_pb2_grpc, scheduler_pb2, scheduler_pb2_grpc
from tests.gpu_worker.tiny_model import TinyAdapter

# The stubs call these abstract; at run time a method that is not overridden answers UNIMPLEMENTED.
_Store: Any = adapter_store_pb2_grpc.AdapterStoreServiceServicer
_Scheduler: Any = scheduler_pb2_grpc.SchedulerServiceServicer
CHUNK_BYTES = 1000


class FakeStore:
    """Serves packed adapters by version."""

    def __init__(self) -> None:
        self.adapters: dict[str, TinyAdapter] = {}
        # Versions whose first chunk is out.
        self.started: asyncio.Queue[str] = asyncio.Queue()
        # Cleared to hold downloads behind their first chunk.
        self.go_on = asyncio.Event()
        self.go_on.set()
        # Cleared to answer nothing at all.
        self.answering = asyncio.Event()
        self.answering.set()
        # Where each call began.
        self.offsets: list[int] = []
        # (version, number of the chunk before which a call breaks, once)
        self.breaks: set[tuple[str, int]] = set()
        # The same, but the call ends there as if all had come.
        self.ends: set[tuple[str, int]] = set()

    async def FetchWeights(
        self, request: adapter_store_pb2.FetchWeightsRequest, context: Any
    ) -> AsyncIterator[adapter_store_pb2.FetchWeightsResponse]:
        await self.answering.wait()
        adapter = self.adapters.get(request.adapter_version)
        if adapter is None:
            raise NotFound("ADAPTER_NOT_FOUND", "no such adapter")
        yield adapter_store_pb2.FetchWeightsResponse(layout=layout_to_proto(adapter.layout))
        content = adapter.content
        self.offsets.append(request.offset_bytes)
        for offset in range(request.offset_bytes, len(content), CHUNK_BYTES):
            data = content[offset : offset + CHUNK_BYTES]
            place = request.adapter_version, offset // CHUNK_BYTES
            if place in self.breaks:
                self.breaks.discard(place)
                raise Unavailable("TEST", "the connection is cut")
            if place in self.ends:
                self.ends.discard(place)
                return
            chunk = adapter_store_pb2.FetchWeightsChunk(offset_bytes=offset, data=data)
            yield adapter_store_pb2.FetchWeightsResponse(chunk=chunk)
            if offset == 0:
                self.started.put_nowait(request.adapter_version)
            await self.go_on.wait()


class FakeScheduler:
    """Welcomes one worker at a time and sends it what the test puts in line."""

    def __init__(self) -> None:
        self.hellos: asyncio.Queue[scheduler_pb2.WorkerHello] = asyncio.Queue()
        self.reports: asyncio.Queue[scheduler_pb2.StepReport] = asyncio.Queue()
        self._commands: asyncio.Queue[scheduler_pb2.Command] = asyncio.Queue()
        self._seq = 0

    def command(self, **command: Any) -> None:
        """The next command of the stream: `command(offer=...)`."""
        self._seq += 1
        self._commands.put_nowait(scheduler_pb2.Command(seq=self._seq, **command))

    async def Register(
        self, requests: AsyncIterator[scheduler_pb2.RegisterRequest], context: Any
    ) -> AsyncIterator[scheduler_pb2.RegisterResponse]:
        hello = (await anext(requests)).hello
        self._seq = 0
        yield scheduler_pb2.RegisterResponse(welcome=scheduler_pb2.SchedulerWelcome(scheduler_epoch=1))
        self.hellos.put_nowait(hello)
        reader = asyncio.create_task(self._read(requests))
        try:
            while True:
                batch = scheduler_pb2.CommandBatch(scheduler_epoch=1, commands=[await self._commands.get()])
                yield scheduler_pb2.RegisterResponse(commands=batch)
        finally:
            reader.cancel()

    async def _read(self, requests: AsyncIterator[scheduler_pb2.RegisterRequest]) -> None:
        async for request in requests:
            self.reports.put_nowait(request.report)


@asynccontextmanager
async def serving(
    store: FakeStore | None = None, scheduler: FakeScheduler | None = None, port: int = 0
) -> AsyncIterator[str]:
    """HOST:PORT of a server with the given neighbours."""
    server = grpc.aio.server(interceptors=[ErrorInterceptor()])
    if store is not None:
        store_servicer = _Store()
        store_servicer.FetchWeights = store.FetchWeights
        adapter_store_pb2_grpc.add_AdapterStoreServiceServicer_to_server(store_servicer, server)
    if scheduler is not None:
        scheduler_servicer = _Scheduler()
        scheduler_servicer.Register = scheduler.Register
        scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(scheduler_servicer, server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)
