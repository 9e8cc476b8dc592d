"""WorkerService: the streams on which gateways receive their tokens."""

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from common.errors import FailedPrecondition, InvalidArgument
from common.version import PROTOCOL_VERSION
from gpu_worker.face import Face
from loraplex.v1 import engine_pb2, worker_pb2, worker_pb2_grpc

if TYPE_CHECKING:
    import grpc


class WorkerServicer(worker_pb2_grpc.WorkerServiceServicer):
    """Attach: hello, welcome, then aborts in and tokens out."""

    def __init__(self, face: Face) -> None:
        self._face = face

    async def Attach(
        self,
        request_iterator: AsyncIterator[worker_pb2.AttachRequest],
        context: "grpc.aio.ServicerContext[worker_pb2.AttachRequest, worker_pb2.AttachResponse]",
    ) -> AsyncIterator[worker_pb2.AttachResponse]:
        hello = await _hello(request_iterator)
        yield worker_pb2.AttachResponse(welcome=self._face.welcome(hello.known_tokenizer_digest))
        queue = self._face.streams.attach(hello.gateway_id)
        reader = asyncio.create_task(self._read_aborts(request_iterator))
        getter = asyncio.create_task(queue.get())
        closing = asyncio.create_task(self._face.streams.closing.wait())
        try:
            while True:
                await asyncio.wait({reader, getter, closing}, return_when=asyncio.FIRST_COMPLETED)
                if not getter.done():
                    if not queue.empty():
                        continue
                    # The gateway closed its half, or the worker is about to end: no more tokens go this way.
                    return
                yield worker_pb2.AttachResponse(tokens=getter.result())
                getter = asyncio.create_task(queue.get())
        finally:
            reader.cancel()
            getter.cancel()
            closing.cancel()
            self._face.streams.detach(hello.gateway_id, queue)

    async def _read_aborts(self, requests: AsyncIterator[worker_pb2.AttachRequest]) -> None:
        async for request in requests:
            if request.HasField("abort"):
                self._face.send(engine_pb2.EngineCommand(abort=request.abort))


async def _hello(requests: AsyncIterator[worker_pb2.AttachRequest]) -> worker_pb2.AttachHello:
    first = await anext(requests, None)
    if first is None or not first.HasField("hello") or not first.hello.gateway_id:
        raise InvalidArgument("HELLO_EXPECTED", "the first message of Attach must be a hello with a gateway_id")
    if first.hello.protocol_version != PROTOCOL_VERSION:
        raise FailedPrecondition(
            "PROTOCOL_MISMATCH",
            f"the gateway speaks protocol {first.hello.protocol_version}, this worker {PROTOCOL_VERSION}",
        )
    return first.hello
