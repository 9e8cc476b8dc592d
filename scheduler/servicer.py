"""SchedulerService: check, call, map, return."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from common.errors import FailedPrecondition, InvalidArgument, Unavailable
from common.version import PROTOCOL_VERSION
from loraplex.v1 import scheduler_pb2, scheduler_pb2_grpc
from scheduler.dispatcher import Dispatcher
from scheduler.peers import GatewayPeer, Peer, WorkerPeer

_SomePeer = TypeVar("_SomePeer", bound=Peer[Any])


class SchedulerServicer(scheduler_pb2_grpc.SchedulerServiceServicer):
    """What gateways, workers and operators call."""

    def __init__(self) -> None:
        # None while another scheduler is the active one.
        self.active: Dispatcher | None = None

    @property
    def _dispatcher(self) -> Dispatcher:
        """Raises Unavailable on a standby."""
        if self.active is None:
            message = "this scheduler stands by: another one is active"
            raise Unavailable("STANDBY", message, retry_after_seconds=1.0)
        return self.active

    async def Connect(self, request_iterator: Any, context: Any) -> AsyncIterator[scheduler_pb2.ConnectResponse]:
        hello: scheduler_pb2.GatewayHello = await _first_hello(request_iterator)
        if not hello.gateway_id:
            raise InvalidArgument("MISSING_FIELD", "the hello has no gateway_id", field="hello.gateway_id")
        _check_protocol(f"gateway {hello.gateway_id}", hello.protocol_version)
        peer = self._dispatcher.connect(hello)
        reading = self._read_gateway(peer, request_iterator)
        async with aclosing(_converse(peer, reading, self._dispatcher.disconnect, context)) as messages:
            async for message in messages:
                yield message

    async def Register(self, request_iterator: Any, context: Any) -> AsyncIterator[scheduler_pb2.RegisterResponse]:
        hello: scheduler_pb2.WorkerHello = await _first_hello(request_iterator)
        _check_protocol(f"worker {hello.worker_id}", hello.model.protocol_version)
        peer = self._dispatcher.register(hello)
        reading = self._read_worker(peer, request_iterator)
        async with aclosing(_converse(peer, reading, self._dispatcher.unregister, context)) as messages:
            async for message in messages:
                yield message

    async def GetState(self, request: scheduler_pb2.GetStateRequest, context: Any) -> scheduler_pb2.GetStateResponse:
        return self._dispatcher.state()

    async def Explain(self, request: scheduler_pb2.ExplainRequest, context: Any) -> scheduler_pb2.ExplainResponse:
        if not request.request_id:
            raise InvalidArgument("MISSING_FIELD", "request_id is empty", field="request_id")
        return scheduler_pb2.ExplainResponse(sentences=self._dispatcher.explain(request.request_id))

    async def _read_gateway(self, peer: GatewayPeer, requests: AsyncIterator[scheduler_pb2.ConnectRequest]) -> None:
        async for request in requests:
            match request.WhichOneof("message"):
                case "submit":
                    self._dispatcher.submit(peer, request.submit.request)
                case "abort":
                    self._dispatcher.abort(peer, request.abort)
                case "hello":
                    raise _second_hello()

    async def _read_worker(self, peer: WorkerPeer, requests: AsyncIterator[scheduler_pb2.RegisterRequest]) -> None:
        async for request in requests:
            match request.WhichOneof("message"):
                case "report":
                    self._dispatcher.report(peer, request.report)
                case "hello":
                    raise _second_hello()


async def _first_hello(requests: AsyncIterator[Any]) -> Any:
    """The hello every stream begins with. Raises InvalidArgument when something else comes first, or nothing."""
    request = await anext(requests, None)
    if request is None or not request.HasField("hello"):
        raise InvalidArgument("HELLO_EXPECTED", "the first message of the stream must be a hello", field="hello")
    return request.hello


def _check_protocol(peer: str, protocol_version: int) -> None:
    if protocol_version != PROTOCOL_VERSION:
        raise FailedPrecondition(
            "PROTOCOL_MISMATCH",
            f"{peer} speaks protocol version {protocol_version}; this scheduler speaks {PROTOCOL_VERSION}",
        )


def _second_hello() -> InvalidArgument:
    return InvalidArgument("SECOND_HELLO", "a stream has one hello, its first message", field="hello")


async def _converse(
    peer: _SomePeer, reading: Coroutine[Any, Any, None], leave: Callable[[_SomePeer], None], context: Any
) -> AsyncGenerator[Any, None]:
    """Reads in a task of its own and yields what is to be written. Ends when either side does, and raises its error."""
    reader = asyncio.create_task(reading)

    def end(_: object = None) -> None:
        leave(peer)
        reader.cancel()

    # A call that ends while a message waits to be sent does not run the handler's `finally` at once.
    context.add_done_callback(end)
    reader.add_done_callback(lambda _: peer.close())
    try:
        async for message in peer.messages():
            yield message
        if reader.done():
            reader.result()
    finally:
        end()
        await asyncio.wait({reader})
