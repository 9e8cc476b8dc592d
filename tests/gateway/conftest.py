"""A real gateway between fake peers, over real sockets."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from socketserver import BaseServer
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gateway.config import GatewayConfig
from gateway.service import Gateway
from loraplex.v1 import adapter_store_pb2_grpc, gateway_pb2, gateway_pb2_grpc, scheduler_pb2, types_pb2
from tests.gateway.fakes import FakeScheduler, FakeStore, FakeWorker


@dataclass
class Fleet:
    """The gateway under test, its peers, and stubs that call it."""

    gateway: Gateway
    scheduler: FakeScheduler
    worker: FakeWorker
    store: FakeStore
    channel: grpc.aio.Channel

    @property
    def api(self) -> "gateway_pb2_grpc.GatewayServiceAsyncStub":
        return gateway_pb2_grpc.GatewayServiceStub(self.channel)

    @property
    def store_api(self) -> "adapter_store_pb2_grpc.AdapterStoreServiceAsyncStub":
        return adapter_store_pb2_grpc.AdapterStoreServiceStub(self.channel)

    async def running(self) -> types_pb2.RequestKey:
        """The key of the next request, once the gateway knows that the scheduler has placed it on the worker."""
        spec = await self.scheduler.submitted()
        await self.scheduler.place(spec.key)
        while (known := self.gateway.table.current(spec.key)) is not None and not known.worker_id:  # noqa: ASYNC110  # no event tells
            await asyncio.sleep(0)
        return spec.key

    async def restart_scheduler(self, workers: Sequence[scheduler_pb2.WorkerInfo] | None = None) -> None:
        """A new scheduler at the old address, which lists the same workers unless told otherwise."""
        await self.scheduler.stop()
        old, self.scheduler = self.scheduler, FakeScheduler()
        self.scheduler.port = old.port
        self.scheduler.workers = old.workers if workers is None else list(workers)
        await self.scheduler.start()
        await self.scheduler.connected.wait()

    async def becomes(self, ready: bool) -> None:
        """Returns once the health service says so."""
        wanted = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        watch = health_pb2_grpc.HealthStub(self.channel).Watch(health_pb2.HealthCheckRequest(service="readiness"))
        async for response in watch:
            if response.status == wanted:
                break
        watch.cancel()


StartFleet = Callable[..., Awaitable[Fleet]]


@pytest.fixture(autouse=True)
def quick_metrics_shutdown(monkeypatch: pytest.MonkeyPatch) -> None:
    """The metrics server looks for its end every half second, which each test would wait for."""
    monkeypatch.setattr(BaseServer.serve_forever, "__defaults__", (0.01,))


@pytest.fixture
async def start_fleet() -> AsyncIterator[StartFleet]:
    """Starts peers and a gateway with the given options, and waits until it is ready unless told otherwise."""
    started: list[Fleet] = []

    async def start(*, wait: bool = True, worker: FakeWorker | None = None, **options: Any) -> Fleet:
        scheduler, worker, store = FakeScheduler(), worker or FakeWorker(), FakeStore()
        for peer in (worker, store, scheduler):
            await peer.start()
        scheduler.workers.append(worker.info)
        options = {"drain_seconds": 0.0, "scheduler": scheduler.address, "adapter_store": store.address, **options}
        gateway = Gateway(GatewayConfig(**options))
        await gateway.start()
        fleet = Fleet(gateway, scheduler, worker, store, grpc.aio.insecure_channel(gateway.server.address))
        started.append(fleet)
        if wait:
            await gateway.server.ready.wait()
        return fleet

    yield start
    for fleet in started:
        await fleet.channel.close()
        await fleet.gateway.stop()
        for peer in (fleet.scheduler, fleet.worker, fleet.store):
            await peer.stop()
            peer.give_back_port()


@pytest.fixture
async def fleet(start_fleet: StartFleet) -> Fleet:
    return await start_fleet()


def ask(text: str = "hi", **fields: Any) -> gateway_pb2.GenerateRequest:
    return gateway_pb2.GenerateRequest(text=text, **fields)


async def read_all(call: Any) -> list[gateway_pb2.GenerateResponse]:
    """What is left of a stream, also after a `read()`."""
    responses = []
    while (response := await call.read()) is not grpc.aio.EOF:
        responses.append(response)
    return responses


async def failure(call: Any) -> grpc.aio.AioRpcError:
    """The error a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (read_all(call) if hasattr(call, "__aiter__") else call)
    return caught.value


def reason_of(error: grpc.aio.AioRpcError) -> str:
    """Of the ErrorInfo; empty when there is none."""
    info = _detail(error, error_details_pb2.ErrorInfo())
    return "" if info is None else info.reason


def retry_seconds_of(error: grpc.aio.AioRpcError) -> float | None:
    """Of the RetryInfo."""
    retry = _detail(error, error_details_pb2.RetryInfo())
    return None if retry is None else retry.retry_delay.ToMilliseconds() / 1000


def _detail(error: grpc.aio.AioRpcError, wanted: Any) -> Any:
    trailers = dict(error.trailing_metadata() or ())
    status = status_pb2.Status.FromString(trailers.get("grpc-status-details-bin", b""))
    return next((wanted for detail in status.details if detail.Unpack(wanted)), None)
