"""One scheduler is active, whatever happens to it: real Redis, real processes."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common.channel import connect
from common.redis_client import RedisAddress
from loraplex.v1 import scheduler_pb2, scheduler_pb2_grpc
from scheduler.config import SchedulerConfig
from scheduler.lease import EPOCHS_PER_LIFE, Lease
from tests.adapter_store.redis_server import PATIENT_SECONDS, RedisServer
from tests.checkout import ROOT
from tests.scheduler.fakes import FakeGateway, FakeWorker, make_spec

# A machine that is busy with something else may keep a process from renewing for seconds.
LEASE_SECONDS = 6.0
# A takeover takes a lease and a bit; this is for a machine that is busy with something else.
DEADLINE_SECONDS = 50.0
SERVICE = scheduler_pb2.DESCRIPTOR.services_by_name["SchedulerService"].full_name
SERVING = health_pb2.HealthCheckResponse.SERVING


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path / "redis")
    server.start()
    yield server
    server.stop()


def lease(server: RedisServer, seconds: float = LEASE_SECONDS) -> Lease:
    address = RedisAddress(server.url, timeout_seconds=PATIENT_SECONDS)
    return Lease(address.client(), address.prefix, seconds)


class TestLease:
    async def test_one_has_it_and_the_next_gets_a_greater_epoch(self, redis_server: RedisServer) -> None:
        first, second = lease(redis_server, seconds=1000.0), lease(redis_server)
        epoch = await first.acquire()
        waiting = asyncio.create_task(second.acquire())
        done, _ = await asyncio.wait({waiting}, timeout=LEASE_SECONDS / 2)
        assert (done, second.current, first.current) == (set(), False, True)
        await first.close()
        assert await waiting >= epoch + EPOCHS_PER_LIFE
        await second.close()

    async def test_who_does_not_renew_loses_it_to_the_next(self, redis_server: RedisServer) -> None:
        silent, next_one = lease(redis_server), lease(redis_server)
        await silent.acquire()
        await next_one.acquire()
        assert not silent.current
        await asyncio.wait_for(silent.keep(), DEADLINE_SECONDS)
        # Who has lost it does not give back what is another's.
        await silent.close()
        assert redis_server.call("EXISTS", "loraplex:scheduler:lease") == 1
        await next_one.close()

    async def test_who_renews_keeps_it(self, redis_server: RedisServer) -> None:
        holder, other = lease(redis_server), lease(redis_server)
        await holder.acquire()
        keeping, waiting = asyncio.create_task(holder.keep()), asyncio.create_task(other.acquire())
        done, _ = await asyncio.wait({keeping, waiting}, timeout=1.5 * LEASE_SECONDS)
        assert done == set()
        for task in (keeping, waiting):
            task.cancel()
        await asyncio.gather(keeping, waiting, return_exceptions=True)
        await holder.close()
        await other.close()

    async def test_an_epoch_is_greater_than_one_of_a_clock_that_was_ahead(self, redis_server: RedisServer) -> None:
        ahead = time.time_ns() // 1_000_000 + 10**9
        redis_server.call("SET", "loraplex:scheduler:epoch", ahead)
        holder = lease(redis_server)
        assert await holder.acquire() == ahead + EPOCHS_PER_LIFE
        await holder.close()

    async def test_an_epoch_after_redis_lost_its_keys_is_not_smaller_than_one_without_redis(
        self, redis_server: RedisServer
    ) -> None:
        before = time.time_ns() // 1_000_000
        holder = lease(redis_server)
        assert await holder.acquire() >= before
        await holder.close()

    async def test_who_has_it_goes_on_while_redis_is_away_and_gives_up_when_it_is_forgotten(
        self, redis_server: RedisServer
    ) -> None:
        holder = lease(redis_server)
        await holder.acquire()
        keeping = asyncio.create_task(holder.keep())
        redis_server.stop()
        done, _ = await asyncio.wait({keeping}, timeout=1.5 * LEASE_SECONDS)
        assert (done, holder.current) == (set(), True)
        redis_server.start()
        await asyncio.wait_for(keeping, DEADLINE_SECONDS)
        assert not holder.current
        await holder.close()


@dataclass
class SchedulerProcess:
    """`python -m scheduler` with a lease."""

    process: "subprocess.Popen[str]"
    address: str

    async def health(self, service: str) -> int:
        async with connect(self.address) as channel:
            request = health_pb2.HealthCheckRequest(service=service)
            return int((await health_pb2_grpc.HealthStub(channel).Check(request, timeout=DEADLINE_SECONDS)).status)

    async def becomes_active(self) -> None:
        async with connect(self.address) as channel:
            request = health_pb2.HealthCheckRequest(service=SERVICE)
            watch = health_pb2_grpc.HealthStub(channel).Watch(request, timeout=DEADLINE_SECONDS)
            async for response in watch:
                if response.status == SERVING:
                    watch.cancel()
                    return


class Pair:
    """An active scheduler and its standby; what is dialled is both."""

    def __init__(self, redis_url: str) -> None:
        self._options = ["--redis", redis_url, "--lease-seconds", str(LEASE_SECONDS), "--redis-timeout-seconds", "2"]
        self._options += ["--recovery-seconds", "0", "--drain-seconds", "0"]
        self.active = self.start()
        self.standby = self.active

    def start(self) -> SchedulerProcess:
        command = [sys.executable, "-m", "scheduler", "--port", "0", "--metrics-port", "0", *self._options]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        _, _, address, _ = process.stdout.readline().split()
        return SchedulerProcess(process, address.removeprefix("grpc="))

    def dial(self) -> grpc.aio.Channel:
        return connect(f"ipv4:{self.standby.address},{self.active.address}", service=SERVICE)

    def stop(self) -> None:
        for scheduler in (self.active, self.standby):
            scheduler.process.kill()
            scheduler.process.wait()
            assert scheduler.process.stdout is not None
            scheduler.process.stdout.close()


@pytest.fixture
async def pair(redis_server: RedisServer) -> AsyncIterator[Pair]:
    pair = Pair(redis_server.url)
    try:
        await pair.active.becomes_active()
        pair.standby = pair.start()
        yield pair
    finally:
        pair.stop()


async def joined(channel: grpc.aio.Channel) -> tuple[FakeGateway, FakeWorker]:
    """Both, once there is somebody to take them."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while True:
            gateway, worker = FakeGateway(channel, "g"), FakeWorker(channel, "w0")
            try:
                await worker.register()
                await gateway.connect()
            except (grpc.aio.AioRpcError, EOFError):
                await asyncio.sleep(0.05)
            else:
                return gateway, worker


async def places(gateway: FakeGateway, worker: FakeWorker, request_id: str) -> bool:
    await gateway.submit(make_spec(request_id))
    return (await worker.offer()).request.key.request_id == (await gateway.placed())[0] == request_id


async def test_a_standby_is_ready_and_serves_nothing(pair: Pair) -> None:
    assert [await pair.standby.health(name) == SERVING for name in ("liveness", "readiness", "", SERVICE)] == [
        True,
        True,
        False,
        False,
    ]
    async with connect(pair.standby.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match="stands by"):
            await scheduler_pb2_grpc.SchedulerServiceStub(channel).GetState(scheduler_pb2.GetStateRequest())


async def test_a_killed_scheduler_is_followed_by_its_standby(pair: Pair) -> None:
    async with pair.dial() as channel:
        gateway, worker = await joined(channel)
        assert await places(gateway, worker, "before")
        pair.active.process.kill()
        heir, heir_worker = await joined(channel)
        assert heir.scheduler_epoch >= gateway.scheduler_epoch + EPOCHS_PER_LIFE
        # Commands of the killed one, wherever they still are, are void for a worker that has had one of these.
        assert heir_worker.scheduler_epoch > worker.scheduler_epoch
        assert await places(heir, heir_worker, "after")


async def test_a_scheduler_that_is_told_to_go_hands_over_before_the_lease_ends(redis_server: RedisServer) -> None:
    leaving, heir = lease(redis_server, seconds=1000.0), lease(redis_server, seconds=DEADLINE_SECONDS)
    await leaving.acquire()
    await leaving.close()
    assert await asyncio.wait_for(heir.acquire(), DEADLINE_SECONDS)
    await heir.close()


async def test_one_that_slept_through_its_lease_places_nothing_and_ends(pair: Pair) -> None:
    async with pair.dial() as channel:
        gateway, worker = await joined(channel)
        os.kill(pair.active.process.pid, signal.SIGSTOP)
        # It lies in the sleeper's socket and is the first that it sees.
        await gateway.submit(make_spec("asleep"))
        await pair.standby.becomes_active()
        os.kill(pair.active.process.pid, signal.SIGCONT)
        with pytest.raises((EOFError, grpc.aio.AioRpcError)):
            await worker.command()
        assert await asyncio.to_thread(pair.active.process.wait, DEADLINE_SECONDS) == 1
        heir, heir_worker = await joined(channel)
        assert heir.scheduler_epoch > gateway.scheduler_epoch
        assert await places(heir, heir_worker, "asleep")


async def test_it_is_one_lease_for_each_prefix(redis_server: RedisServer) -> None:
    """Two cells may share a Redis."""
    address = RedisAddress(redis_server.url, timeout_seconds=PATIENT_SECONDS)
    cells = [Lease(address.client(), prefix, LEASE_SECONDS) for prefix in ("one", "two")]
    await asyncio.gather(*(cell.acquire() for cell in cells))
    assert all(cell.current for cell in cells)
    for cell in cells:
        await cell.close()


async def test_a_lease_too_short_to_be_renewed_is_refused() -> None:
    with pytest.raises(ValueError, match="lease_seconds is 0\\.4; it must exceed twice"):
        SchedulerConfig(lease_seconds=0.4, redis_timeout_seconds=0.2)
