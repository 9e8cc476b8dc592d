"""Two schedulers over one Redis: whatever happens to the active one, requests end once and new ones are served."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from loraplex import AsyncClient
from loraplex.fleet import Fleet, FleetOptions, Service, find_services
from loraplex.process import ServiceProcess
from tests.adapter_store.redis_server import RedisServer, free_port
from tests.e2e.support import PATIENT, assert_books_balance, finish_counts, greedy_tokens, metric, until
from tests.e2e.tiny_model import TinyModel, with_long_context

NAMES = ["rank-1", "rank-3", "rank-8"]
# Tokens: seconds, in the middle of which something happens.
LONG = 1500
PROMPT_TOKENS = "loraplex_gateway_prompt_tokens_total"
# Two sequences at a time, so that requests wait at the scheduler when it goes.
FEW = ["--max-sequences", "2"]
# A scheduler that a busy machine keeps waiting must not lose its lease for that; the other one takes it as late.
LEASE = ["--lease-seconds", "10", "--redis-timeout-seconds", "3"]
# And requests wait for the other one.
GRACE = ["--scheduler-grace-seconds", "100"]


class Wire:
    """A way to Redis that can be cut. It runs on the test's event loop."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self.port = free_port()

    async def mend(self) -> None:
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", self.port)

    async def cut(self) -> None:
        """Refuses connections; those that are open end."""
        if self._server is not None:
            self._server.close()
            for writer in self._writers:
                writer.transport.abort()
            await self._server.wait_closed()
            self._server = None

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._target)
        self._writers |= {writer, back}
        if self._server is None:
            # Cut while this one was being laid.
            for end in (writer, back):
                end.transport.abort()
        await asyncio.gather(_copy(reader, back), _copy(there, writer), return_exceptions=True)
        self._writers -= {writer, back}


async def _copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    """Until either side ends."""
    while data := await source.read(65536):
        sink.write(data)
        await sink.drain()
    sink.close()


@dataclass
class Cell:
    """A fleet with a second scheduler."""

    fleet: Fleet
    client: AsyncClient
    standby: Service
    # From the fleet's own scheduler to Redis.
    wire: Wire

    @property
    def active(self) -> Service:
        return self.fleet.scheduler

    async def becomes(self, scheduler: Service, gauge: str) -> None:
        """Waits until the scheduler's gauge is 1, without holding up the event loop."""
        await asyncio.to_thread(
            until, lambda: metric(scheduler, f"loraplex_scheduler_{gauge}") == 1, f"{scheduler.name}: {gauge}"
        )

    async def long_answer(self, tiny: TinyModel, started: asyncio.Event) -> list[int]:
        """Of the base model, in the middle of which something may happen."""
        tokens: list[int] = []
        stream = self.client.stream(
            tiny.prompts[""], temperature=0.0, max_tokens=LONG, ignore_eos=True, return_token_ids=True, timeout=100.0
        )
        async for delta in stream:
            tokens += delta.token_ids
            started.set()
        return tokens


@asynccontextmanager
async def running(options: FleetOptions) -> AsyncIterator[Fleet]:
    """A fleet; starting and stopping it does not hold up the event loop, on which its Redis is reached."""
    fleet = Fleet(options)
    await asyncio.to_thread(fleet.__enter__)
    try:
        yield fleet
    finally:
        await asyncio.to_thread(fleet.stop)


@asynccontextmanager
async def cell(tiny: TinyModel, folder: Path) -> AsyncIterator[Cell]:
    """The fleet's own scheduler is the active one."""
    redis = RedisServer(folder / "redis")
    redis.start()
    ports = [free_port(), free_port()]
    wire = Wire(redis.port)
    await wire.mend()
    wired, direct = (["--redis", url, *LEASE] for url in (f"redis://127.0.0.1:{wire.port}/0", redis.url))
    both = ["--scheduler", "ipv4:" + ",".join(f"127.0.0.1:{port}" for port in reversed(ports))]
    extra = {"scheduler": [*wired, "--port", str(ports[0])], "gpu_worker": [*FEW, *both], "gateway": [*GRACE, *both]}
    base = with_long_context(tiny.base, folder / "base")
    options = FleetOptions(model=base, data_dir=folder / "fleet", memory="32MiB", extra=extra)
    command = [sys.executable, "-m", "scheduler", *direct, "--port", str(ports[1]), "--metrics-port", "0"]
    try:
        async with running(options) as fleet:
            log = folder / "standby.log"
            process = ServiceProcess("standby", command, working_directory=find_services(), log=log)
            try:
                address = await asyncio.to_thread(process.ready.result, 100)
                standby = Service(
                    name="standby",
                    pid=process.pid,
                    address=address["grpc"],
                    metrics_address=address["metrics"],
                    log=log,
                )
                async with AsyncClient(fleet.gateway.address, retries=PATIENT) as client:
                    for name in NAMES:
                        await client.adapters.push(name, tiny.adapters[name])
                    yield Cell(fleet, client, standby, wire)
            finally:
                process.kill()
                process.exited.result()
    finally:
        await wire.cut()
        redis.stop()


def dispatched(scheduler: Service) -> float:
    """Offers to workers."""
    return metric(scheduler, "loraplex_scheduler_dispatch_total")


async def test_requests_end_once_when_the_active_scheduler_is_killed(tiny: TinyModel, tmp_path: Path) -> None:
    async with cell(tiny, tmp_path) as it:
        expected = await it.long_answer(tiny, asyncio.Event())
        before = finish_counts(it.fleet.workers[0])["length"]
        started = [asyncio.Event(), asyncio.Event()]
        running = [asyncio.create_task(it.long_answer(tiny, event)) for event in started]
        await asyncio.gather(*(event.wait() for event in started))
        submitted = metric(it.fleet.gateway, PROMPT_TOKENS) + sum(len(tiny.prompts[name]) for name in 2 * NAMES)
        queued = [asyncio.create_task(greedy_tokens(it.client, name, tiny.prompts[name])) for name in 2 * NAMES]
        await asyncio.to_thread(
            until, lambda: metric(it.fleet.gateway, PROMPT_TOKENS) == submitted, "all are submitted"
        )
        os.kill(it.active.pid, signal.SIGKILL)
        assert await asyncio.gather(*running) == [expected] * 2
        assert await asyncio.gather(*queued) == [tiny.answers[name] for name in 2 * NAMES]
        assert finish_counts(it.fleet.workers[0])["length"] == before + 8
        await it.becomes(it.standby, "active")
        # The client waits and tries again as the hint says, if the gateway has not found the other one yet.
        assert await greedy_tokens(it.client, "rank-8", tiny.prompts["rank-8"]) == tiny.answers["rank-8"]
        assert_books_balance(it.fleet.workers[0])


async def test_a_scheduler_that_slept_through_its_lease_hands_over_when_it_wakes(
    tiny: TinyModel, tmp_path: Path
) -> None:
    async with cell(tiny, tmp_path) as it:

        def is_followed() -> bool:
            # Again and again, should somebody else wake it.
            os.kill(it.active.pid, signal.SIGSTOP)
            return metric(it.standby, "loraplex_scheduler_active") == 1

        os.kill(it.active.pid, signal.SIGSTOP)
        asleep = [asyncio.create_task(greedy_tokens(it.client, name, tiny.prompts[name])) for name in NAMES]
        await asyncio.to_thread(until, is_followed, "it takes over")
        os.kill(it.active.pid, signal.SIGCONT)
        assert await asyncio.gather(*asleep) == [tiny.answers[name] for name in NAMES]
        assert finish_counts(it.fleet.workers[0])["length"] == 3
        await asyncio.to_thread(until, lambda: "the lease is lost" in it.active.log.read_text(), "it says why it ends")
        await it.becomes(it.standby, "workers")


async def test_an_active_scheduler_that_alone_has_lost_redis_does_not_act_beside_the_next(
    tiny: TinyModel, tmp_path: Path
) -> None:
    """It cannot know that another decides now. Whom it has stay with it until it can; each request runs once."""
    async with cell(tiny, tmp_path) as it:
        worker = it.fleet.workers[0]
        await it.wire.cut()
        await it.becomes(it.standby, "active")
        assert metric(it.active, "loraplex_scheduler_active") == 1
        answers = await asyncio.gather(*(greedy_tokens(it.client, name, tiny.prompts[name]) for name in 2 * NAMES))
        assert answers == [tiny.answers[name] for name in 2 * NAMES]
        assert finish_counts(worker)["length"] == 6
        # The next one has nobody to act on as long as the first has.
        assert [metric(it.standby, f"loraplex_scheduler_{name}") for name in ("workers", "gateways")] == [0, 0]
        assert dispatched(it.standby) == 0
        running = [asyncio.create_task(greedy_tokens(it.client, name, tiny.prompts[name])) for name in NAMES]
        await it.wire.mend()
        await asyncio.to_thread(until, lambda: "the lease is lost" in it.active.log.read_text(), "it says why it ends")
        assert await asyncio.gather(*running) == [tiny.answers[name] for name in NAMES]
        assert await greedy_tokens(it.client, "rank-8", tiny.prompts["rank-8"]) == tiny.answers["rank-8"]
        assert finish_counts(worker)["length"] == 10
        await it.becomes(it.standby, "workers")
        assert_books_balance(worker)
