"""Our four services through gRPC: `loraplex.fleet.Fleet`, one worker, and this process as the client.

The client runs on the same cores as everything else. It is `loraplex.AsyncClient`, one channel, all requests at once.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path

from benchmarks.serving.fixture import Fixture
from benchmarks.serving.outcome import Outcome, peak_rss_bytes, reset_peak_rss, with_children
from benchmarks.serving.systems.engine import MEMORY
from benchmarks.serving.workload import BASE, Request, Workload
from loraplex import AsyncClient
from loraplex.fleet import Fleet, FleetOptions
from loraplex.requests import GenerateOptions

TIMEOUT_SECONDS = 600.0

# Tokens, and when each came.
Answer = tuple[tuple[int, ...], tuple[float, ...]]
Ask = Callable[[AsyncClient, Request, float], Awaitable[Answer]]


class FleetSystem:
    """`how` is unary, for whole answers, or stream, for tokens as they come."""

    def __init__(self, fixture: Fixture, threads: int, data_dir: Path) -> None:
        options = FleetOptions(
            model=fixture.base,
            data_dir=data_dir,
            memory=MEMORY[fixture.model],
            extra={"gpu_worker": ["--threads", str(threads)]},
        )
        self._fleet = Fleet(options)
        self._fleet.__enter__()

    def run(self, workload: Workload, how: str) -> Outcome:
        pids = [pid for service in self._fleet.services.values() for pid in with_children(service.pid)]
        reset_peak_rss(pids)
        seconds, answers = asyncio.run(self._ask(workload, self._streamed if how == "stream" else self._whole))
        outputs, times = tuple(tokens for tokens, _ in answers), tuple(times for _, times in answers)
        return Outcome(seconds, outputs, times, peak_rss_bytes(pids))

    def close(self) -> None:
        self._fleet.stop()

    async def _ask(self, workload: Workload, ask: Ask) -> tuple[float, list[Answer]]:
        async with AsyncClient(self._fleet.gateway.address) as client:
            await client.models()
            started = time.perf_counter()
            answers = await asyncio.gather(*(ask(client, request, started) for request in workload.requests))
            return time.perf_counter() - started, answers

    async def _whole(self, client: AsyncClient, request: Request, started: float) -> Answer:
        answer = await client.generate(
            request.prompt, _adapter(request), timeout=TIMEOUT_SECONDS, **_options(request.output_tokens)
        )
        return answer.token_ids, ()

    async def _streamed(self, client: AsyncClient, request: Request, started: float) -> Answer:
        tokens: list[int] = []
        times: list[float] = []
        stream = client.stream(
            request.prompt, _adapter(request), timeout=TIMEOUT_SECONDS, **_options(request.output_tokens)
        )
        async with aclosing(stream):
            async for delta in stream:
                tokens += delta.token_ids
                times += [time.perf_counter() - started] * len(delta.token_ids)
        return tuple(tokens), tuple(times)


def _adapter(request: Request) -> str:
    return "" if request.adapter == BASE else f"adapter-{request.adapter:03d}"


def _options(max_tokens: int) -> GenerateOptions:
    return {"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True, "return_token_ids": True}
