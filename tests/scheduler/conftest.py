"""A real scheduler on a real socket, and what the tests say to it as gateways and workers."""

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from loraplex.v1 import scheduler_pb2_grpc
from scheduler.config import SchedulerConfig
from scheduler.service import SchedulerService
from tests.scheduler.fakes import FakeGateway, FakeWorker


@dataclass
class Cell:
    """The scheduler under test and the peers that dialled it."""

    service: SchedulerService
    channel: grpc.aio.Channel
    peers: list[FakeGateway | FakeWorker] = field(default_factory=list)

    @property
    def api(self) -> "scheduler_pb2_grpc.SchedulerServiceAsyncStub":
        return scheduler_pb2_grpc.SchedulerServiceStub(self.channel)

    async def gateway(self, gateway_id: str = "g") -> FakeGateway:
        """Connected, welcomed and told of the workers."""
        gateway = FakeGateway(self.channel, gateway_id)
        self.peers.append(gateway)
        await gateway.connect()
        return gateway

    async def worker(self, worker_id: str = "w0", **hello: Any) -> FakeWorker:
        """Registered and welcomed."""
        worker = FakeWorker(self.channel, worker_id, **hello)
        self.peers.append(worker)
        await worker.register()
        return worker

    async def stop(self) -> None:
        for peer in self.peers:
            peer.hang_up()
        await self.service.stop()
        await self.channel.close()


StartCell = Callable[..., Awaitable[Cell]]


@pytest.fixture
async def start_cell() -> AsyncIterator[StartCell]:
    """Starts a scheduler with the given options; it places at once unless told otherwise."""
    started: list[Cell] = []

    async def start(**options: Any) -> Cell:
        defaults: dict[str, Any] = {"port": 0, "metrics_port": 0, "drain_seconds": 0.0, "recovery_seconds": 0.0}
        service = SchedulerService(SchedulerConfig(**(defaults | options)))
        await service.start()
        cell = Cell(service, grpc.aio.insecure_channel(service.server.address))
        started.append(cell)
        return cell

    yield start
    for cell in started:
        await cell.stop()


@pytest.fixture
async def cell(start_cell: StartCell) -> Cell:
    return await start_cell()
