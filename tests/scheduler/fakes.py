"""A gateway and a worker that speak the scheduler's protocol and do what a test says."""

from typing import Any, Generic, TypeVar

import grpc

from common.version import PROTOCOL_VERSION
from loraplex.v1 import scheduler_pb2, scheduler_pb2_grpc, types_pb2

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


def make_key(request_id: str, attempt: int = 0) -> types_pb2.RequestKey:
    return types_pb2.RequestKey(request_id=request_id, attempt=attempt, tenant="default")


def make_spec(
    request_id: str, adapter: str = "", *, prompt: int = 8, max_tokens: int = 8, attempt: int = 0, **fields: Any
) -> types_pb2.RequestSpec:
    return types_pb2.RequestSpec(
        key=make_key(request_id, attempt),
        adapter_id=adapter,
        adapter_version=adapter,
        adapter_bytes=100 if adapter else 0,
        prompt_token_ids=range(prompt),
        stopping=types_pb2.StoppingParams(max_tokens=max_tokens),
        **fields,
    )


def make_model(**fields: Any) -> types_pb2.ModelIdentity:
    defaults: dict[str, Any] = {
        "name": "tiny",
        "base_fingerprint": "base",
        "tokenizer_digest": "tokenizer",
        "geometry": types_pb2.ModelGeometry(num_layers=2, max_context_tokens=256),
        "protocol_version": PROTOCOL_VERSION,
    }
    return types_pb2.ModelIdentity(**(defaults | fields))


class Stream(Generic[_Request, _Response]):
    """One side of a bidirectional call."""

    def __init__(self, call: "grpc.aio.StreamStreamCall[_Request, _Response]") -> None:
        self.call = call

    async def send(self, message: _Request) -> None:
        await self.call.write(message)

    async def receive(self) -> _Response:
        """The next message. Raises grpc.aio.AioRpcError when the stream ends with an error, EOFError at its end."""
        message: Any = await self.call.read()
        if message is grpc.aio.EOF:
            if await self.call.code() is grpc.StatusCode.OK:
                raise EOFError
            raise grpc.aio.AioRpcError(
                await self.call.code(),
                await self.call.initial_metadata(),
                await self.call.trailing_metadata(),
                await self.call.details(),
            )
        received: _Response = message
        return received

    def hang_up(self) -> None:
        self.call.cancel()


class FakeGateway(Stream[scheduler_pb2.ConnectRequest, scheduler_pb2.ConnectResponse]):
    """Submits, aborts, and reads answers one by one."""

    def __init__(self, channel: grpc.aio.Channel, gateway_id: str) -> None:
        super().__init__(scheduler_pb2_grpc.SchedulerServiceStub(channel).Connect())
        self.gateway_id = gateway_id
        self.scheduler_epoch = 0
        # The last list of workers: id -> info.
        self.workers: dict[str, scheduler_pb2.WorkerInfo] = {}

    async def connect(self, protocol_version: int = PROTOCOL_VERSION) -> None:
        hello = scheduler_pb2.GatewayHello(gateway_id=self.gateway_id, protocol_version=protocol_version)
        await self.send(scheduler_pb2.ConnectRequest(hello=hello))
        self.scheduler_epoch = (await self.receive()).welcome.scheduler_epoch
        await self.worker_list()

    async def submit(self, spec: types_pb2.RequestSpec) -> None:
        await self.send(scheduler_pb2.ConnectRequest(submit=scheduler_pb2.Submit(request=spec)))

    async def abort(
        self,
        key: types_pb2.RequestKey,
        cause: "scheduler_pb2.AbortCause.ValueType" = scheduler_pb2.ABORT_CAUSE_CANCELLED,
    ) -> None:
        await self.send(scheduler_pb2.ConnectRequest(abort=scheduler_pb2.Abort(key=key, cause=cause)))

    async def worker_list(self) -> None:
        """Waits for the next list of workers."""
        while not self._take_workers(await self.receive()):
            pass

    async def answer(self) -> scheduler_pb2.ConnectResponse:
        """The next Placed or Refused; lists of workers in between are taken in."""
        while self._take_workers(response := await self.receive()):
            pass
        return response

    async def placed(self) -> tuple[str, str]:
        """(request id, worker id) of the next answer, which must be Placed."""
        response = await self.answer()
        assert response.HasField("placed"), response
        return response.placed.key.request_id, response.placed.worker_id

    async def refused(self) -> types_pb2.RequestError:
        """The error of the next answer, which must be Refused."""
        response = await self.answer()
        assert response.HasField("refused"), response
        return response.refused.error

    def _take_workers(self, response: scheduler_pb2.ConnectResponse) -> bool:
        if response.HasField("workers"):
            self.workers = {worker.worker_id: worker for worker in response.workers.workers}
        return response.HasField("workers")


class FakeWorker(Stream[scheduler_pb2.RegisterRequest, scheduler_pb2.RegisterResponse]):
    """Registers, reports, and reads commands one by one, checking their numbers."""

    def __init__(self, channel: grpc.aio.Channel, worker_id: str, *, num_pages: int = 64, **hello: Any) -> None:
        super().__init__(scheduler_pb2_grpc.SchedulerServiceStub(channel).Register())
        self.worker_id = worker_id
        capacity = scheduler_pb2.WorkerCapacity(
            num_pages=num_pages, page_bytes=50, page_size=4, max_step_tokens=64, max_sequences=16
        )
        defaults: dict[str, Any] = {
            "worker_id": worker_id,
            "address": f"{worker_id}:1",
            "model": make_model(),
            "capacity": capacity,
        }
        self._hello = scheduler_pb2.WorkerHello(**(defaults | hello))
        self.scheduler_epoch = 0
        self.applied_seq = 0
        self._commands: list[scheduler_pb2.Command] = []

    async def register(self) -> None:
        await self.send(scheduler_pb2.RegisterRequest(hello=self._hello))
        self.scheduler_epoch = (await self.receive()).welcome.scheduler_epoch

    async def command(self) -> scheduler_pb2.Command:
        """The next command."""
        while not self._commands:
            batch = (await self.receive()).commands
            assert batch.scheduler_epoch == self.scheduler_epoch
            self._commands.extend(batch.commands)
        command = self._commands.pop(0)
        assert command.seq == self.applied_seq + 1
        self.applied_seq = command.seq
        return command

    async def offer(self) -> scheduler_pb2.Offer:
        """The next command, which must be an Offer."""
        command = await self.command()
        assert command.HasField("offer"), command
        return command.offer

    async def report(self, *progress: tuple[str, "scheduler_pb2.RequestState.ValueType"], **fields: Any) -> None:
        """Reports (request id, state) pairs and what else is given."""
        report = scheduler_pb2.StepReport(
            worker_id=self.worker_id,
            scheduler_epoch=self.scheduler_epoch,
            applied_seq=self.applied_seq,
            progress=[
                scheduler_pb2.RequestProgress(key=make_key(request_id), state=state) for request_id, state in progress
            ],
            **fields,
        )
        await self.send(scheduler_pb2.RegisterRequest(report=report))

    async def finish(self, request_id: str) -> None:
        await self.report((request_id, scheduler_pb2.REQUEST_STATE_FINISHED))
