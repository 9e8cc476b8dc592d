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
from tests.e2e.support import assert_books_balance, finish_counts, greedy_tokens, metric, until
from tests.e2e.tiny_model import TinyModel

NAMES = ["rank-1", "rank-3", "rank-8"]
LONG = 400
PROMPT_TOKENS = "loraplex_gateway_prompt_tokens_total"
# Two sequences at a time, so that requests wait at the scheduler when it goes.
FEW = ["--max-sequences", "2"]


@dataclass
class Cell:
    """A fleet with a second scheduler."""

    fleet: Fleet
    client: AsyncClient
    standby: Service

    @property
    def active(self) -> Service:
        return self.fleet.scheduler

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
async def cell(tiny: TinyModel, folder: Path) -> AsyncIterator[Cell]:
    """The fleet's own scheduler is the active one."""
    redis = RedisServer(folder / "redis")
    redis.start()
    ports = [free_port(), free_port()]
    lease = ["--redis", redis.url, "--lease-seconds", "2.5"]
    both = ["--scheduler", "ipv4:" + ",".join(f"127.0.0.1:{port}" for port in reversed(ports))]
    extra = {"scheduler": [*lease, "--port", str(ports[0])], "gpu_worker": [*FEW, *both], "gateway": both}
    options = FleetOptions(model=tiny.base, data_dir=folder / "fleet", memory="32MiB", extra=extra)
    command = [sys.executable, "-m", "scheduler", *lease, "--port", str(ports[1]), "--metrics-port", "0"]
    try:
        with Fleet(options) as fleet:
            log = folder / "standby.log"
            process = ServiceProcess("standby", command, working_directory=find_services(), log=log)
            address = await asyncio.to_thread(process.ready.result, 100)
            standby = Service(
                name="standby", pid=process.pid, address=address["grpc"], metrics_address=address["metrics"], log=log
            )
            async with AsyncClient(fleet.gateway.address) as client:
                for name in NAMES:
                    await client.adapters.push(name, tiny.adapters[name])
                yield Cell(fleet, client, standby)
            process.kill()
            process.exited.result()
    finally:
        redis.stop()


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
        # The client waits and tries again as the hint says, if the gateway has not found the other one yet.
        assert await greedy_tokens(it.client, "rank-8", tiny.prompts["rank-8"]) == tiny.answers["rank-8"]
        assert metric(it.standby, "loraplex_scheduler_active") == 1
        assert_books_balance(it.fleet.workers[0])


async def test_a_scheduler_that_slept_through_its_lease_hands_over_when_it_wakes(
    tiny: TinyModel, tmp_path: Path
) -> None:
    async with cell(tiny, tmp_path) as it:
        os.kill(it.active.pid, signal.SIGSTOP)
        asleep = [asyncio.create_task(greedy_tokens(it.client, name, tiny.prompts[name])) for name in NAMES]
        await asyncio.to_thread(until, lambda: metric(it.standby, "loraplex_scheduler_active") == 1, "it takes over")
        os.kill(it.active.pid, signal.SIGCONT)
        assert await asyncio.gather(*asleep) == [tiny.answers[name] for name in NAMES]
        assert finish_counts(it.fleet.workers[0])["length"] == 3
        await asyncio.to_thread(until, lambda: "the lease is lost" in it.active.log.read_text(), "it says why it ends")
        assert metric(it.standby, "loraplex_scheduler_workers") == 1
