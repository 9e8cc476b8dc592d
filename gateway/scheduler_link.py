"""The control path: one Connect stream to the scheduler."""

import asyncio
import time
from collections.abc import Callable

import grpc

from common.errors import Unavailable, from_proto
from common.tls import PemFiles
from common.version import PROTOCOL_VERSION
from gateway.link import IncompatiblePeer, Link
from gateway.requests import InFlight
from gateway.worker_links import WorkerLinks
from loraplex.v1 import scheduler_pb2, scheduler_pb2_grpc

RETRY_SECONDS = 1.0
SERVICE = scheduler_pb2.DESCRIPTOR.services_by_name["SchedulerService"].full_name


class SchedulerLink(Link[scheduler_pb2.ConnectRequest, scheduler_pb2.ConnectResponse]):
    """Submits and aborts requests; learns where they were placed and which workers there are."""

    def __init__(
        self,
        address: str,
        gateway_id: str,
        workers: WorkerLinks,
        grace_seconds: float,
        on_change: Callable[[], None],
        tls: PemFiles | None = None,
    ) -> None:
        """`grace_seconds` is how long unplaced requests wait for a lost scheduler before they fail."""
        super().__init__("scheduler", address, SERVICE, tls)
        self._epoch = 0
        self._gateway_id = gateway_id
        self._workers = workers
        self._table = workers.table
        self._grace_seconds = grace_seconds
        self._on_change = on_change
        self._welcomed = False
        self._grace: asyncio.TimerHandle | None = None

    @property
    def established(self) -> bool:
        return self._welcomed

    def submit(self, in_flight: InFlight) -> None:
        """Raises Unavailable when there is no scheduler to take it."""
        if not (self._welcomed and self._submit(in_flight)):
            raise _unavailable()

    def abort(self, abort: scheduler_pb2.Abort) -> None:
        """Without a stream there is nothing to say: the scheduler forgets a gateway it has lost."""
        self.send(scheduler_pb2.ConnectRequest(abort=abort))

    def _submit(self, in_flight: InFlight) -> bool:
        if in_flight.deadline is not None:
            in_flight.spec.remaining_seconds = max(0.0, in_flight.deadline - time.monotonic())
        return self.send(scheduler_pb2.ConnectRequest(submit=scheduler_pb2.Submit(request=in_flight.spec)))

    def _open(
        self, channel: grpc.aio.Channel
    ) -> "grpc.aio.StreamStreamCall[scheduler_pb2.ConnectRequest, scheduler_pb2.ConnectResponse]":
        return scheduler_pb2_grpc.SchedulerServiceStub(channel).Connect()

    def _hello(self) -> scheduler_pb2.ConnectRequest:
        hello = scheduler_pb2.GatewayHello(gateway_id=self._gateway_id, protocol_version=PROTOCOL_VERSION)
        return scheduler_pb2.ConnectRequest(hello=hello)

    def _received(self, message: scheduler_pb2.ConnectResponse) -> None:
        match message.WhichOneof("message"):
            case "welcome":
                self._welcome(message.welcome.scheduler_epoch)
            case "placed":
                placed = message.placed
                self._workers.place(placed.key, placed.worker_id, placed.adapter_tier)
            case "refused":
                self._table.refuse(message.refused.key, from_proto(message.refused.error))
            case "workers":
                self._workers.update(message.workers.workers)

    def _welcome(self, epoch: int) -> None:
        if epoch < self._epoch:
            raise IncompatiblePeer(f"its epoch is {epoch}; a scheduler of epoch {self._epoch} has taken over from it")
        self._epoch = epoch
        self._welcomed = True
        if self._grace is not None:
            self._grace.cancel()
            self._grace = None
        for in_flight in self._table.unplaced():
            self._submit(in_flight)
        self._on_change()

    def _lost(self) -> None:
        self._welcomed = False
        if self._grace is None:
            loop = asyncio.get_running_loop()
            self._grace = loop.call_later(self._grace_seconds, self._table.fail_unplaced, _unavailable)
        self._on_change()


def _unavailable() -> Unavailable:
    return Unavailable("SCHEDULER_UNAVAILABLE", "the scheduler does not answer", retry_after_seconds=RETRY_SECONDS)
