"""What the end-to-end tests ask of a running fleet."""

import asyncio
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import grpc

from loraplex import AsyncClient, Client
from loraplex.fleet import Fleet, FleetOptions, Service
from loraplex.metrics import fetch_metrics
from loraplex.retries import RetryPolicy
from loraplex.v1 import memory_pb2, memory_pb2_grpc
from tests.e2e.tiny_model import NUM_TOKENS

DEADLINE_SECONDS = 200.0
# Of a client that asks while a part of the fleet comes back: hints of a second make it 15 s at least.
PATIENT = RetryPolicy(attempts=5)


@contextmanager
def running_fleet(
    base: Path, data_dir: Path, adapters: dict[str, Path], *, workers: int = 1, **extra: list[str]
) -> Iterator[Fleet]:
    """A fleet with `adapters` uploaded; `extra` holds more arguments by service name."""
    options = FleetOptions(model=base, data_dir=data_dir, workers=workers, memory="32MiB", extra=extra)
    with Fleet(options) as fleet:
        with Client(fleet.gateway.address) as client:
            for name, folder in adapters.items():
                client.adapters.push(name, folder)
        yield fleet


async def greedy_tokens(
    client: AsyncClient, adapter: str, prompt: list[int], max_tokens: int = NUM_TOKENS
) -> list[int]:
    """Greedy tokens of one request, end-of-sequence ignored."""
    answer = await client.generate(
        prompt,
        adapter,
        temperature=0.0,
        max_tokens=max_tokens,
        ignore_eos=True,
        return_token_ids=True,
        timeout=DEADLINE_SECONDS,
    )
    return list(answer.token_ids)


async def all_at_once(
    client: AsyncClient, prompts: Mapping[str, list[int]], max_tokens: int = NUM_TOKENS
) -> dict[str, list[int]]:
    """Answers of every adapter to its prompt, all requests in flight together."""
    calls = (greedy_tokens(client, name, prompt, max_tokens) for name, prompt in prompts.items())
    answers = await asyncio.gather(*calls)
    return dict(zip(prompts, answers, strict=True))


def greedy_answers(fleet: Fleet, prompts: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """What every adapter answers to its prompt, for tests without an event loop."""

    async def ask() -> dict[str, list[int]]:
        async with AsyncClient(fleet.gateway.address) as client:
            return await all_at_once(client, prompts)

    return asyncio.run(ask())


def memory_usage(worker: Service) -> memory_pb2.GetUsageResponse:
    with grpc.insecure_channel(worker.address) as channel:
        return memory_pb2_grpc.MemoryServiceStub(channel).GetUsage(memory_pb2.GetUsageRequest(), timeout=10)


def resident_adapters(worker: Service) -> int:
    return memory_usage(worker).resident_adapters


def assert_books_balance(worker: Service) -> memory_pb2.GetUsageResponse:
    """The conservation law of the pool, read from outside."""
    usage = memory_usage(worker)
    memory = usage.memory
    taken = memory.quarantined_pages + memory.loading_pages
    taken += memory.kv_pages + memory.prefix_pages + memory.adapter_pages
    assert memory.free_pages + taken == memory.total_pages
    return usage


def until(condition: Callable[[], bool], what: str) -> None:
    """Polls a running service; fails with `what` after the deadline."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"not within {DEADLINE_SECONDS} s: {what}"


def metric(service: Service, name: str) -> float:
    """Sum of all series of a counter or gauge."""
    lines = fetch_metrics(service.metrics_address).splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((name + " ", name + "{")))


def finish_counts(worker: Service) -> Counter[str]:
    """Outputs that ended at the worker, by reason."""
    found = re.findall(
        r'^loraplex_worker_finish_total{reason="(\w+)"} (\S+)$', fetch_metrics(worker.metrics_address), re.MULTILINE
    )
    return Counter({reason: int(float(count)) for reason, count in found})


def processes(fleet: Fleet) -> dict[str, int]:
    """Process name to pid."""
    return {name: service.pid for name, service in fleet.services.items()}
