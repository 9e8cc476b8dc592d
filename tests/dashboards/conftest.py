"""A fleet of two workers under traffic, with Redis, and a Prometheus that has seen all of it."""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import grpc
import pytest

from examples.demo_model.words import SKILLS, prompt_for
from loraplex import AsyncClient, Client, LoraplexError
from loraplex.fleet import Fleet, FleetOptions
from loraplex.v1 import memory_pb2, memory_pb2_grpc, types_pb2
from tests.adapter_store.redis_server import RedisServer
from tests.certificates import authority
from tests.checkout import ROOT
from tests.dashboards.prometheus import Prometheus, scraping

# `make test-dashboards` has an environment of its own, where nothing collected is a failure; `make test` is another.
collect_ignore_glob = [] if find_spec("promql_parser") else ["test_*.py"]

DEMO = ROOT / "examples" / "demo_model"
NUM_WORKERS = 2
_JOBS = {"adapter_store": "adapter-store", "scheduler": "scheduler", "gateway": "gateway"}
NUM_TARGETS = len(_JOBS) + NUM_WORKERS


@dataclass(frozen=True)
class Scene:
    """What the tests ask, and the Unix times between which there was traffic."""

    prometheus: Prometheus
    start: float
    end: float


@pytest.fixture(scope="session")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("scene")
    redis = RedisServer(folder / "redis")
    trusted = authority(_made(folder / "tls"))
    shown = trusted.issue("gateway")
    redis.start()
    options = FleetOptions(
        model=DEMO / "base",
        model_name="loraplex-demo",
        data_dir=folder / "fleet",
        workers=NUM_WORKERS,
        # Not enough for six adapters and the KV of a crowd: adapters come and go.
        memory="3MiB",
        extra={
            "adapter_store": ["--redis", redis.url],
            "gpu_worker": ["--max-sequences", "16"],
            "gateway": [f"--tls-cert={shown.cert}", f"--tls-key={shown.key}"],
        },
    )
    try:
        with Fleet(options) as fleet, scraping(_made(folder / "prometheus"), _targets(fleet)) as prometheus:
            start = time.time()
            workers = [worker.address for worker in fleet.workers]
            _make_traffic(fleet.gateway.address, trusted.cert, workers, prometheus)
            yield Scene(prometheus, start, time.time())
    finally:
        redis.stop()


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _targets(fleet: Fleet) -> dict[str, list[str]]:
    targets = {job: [fleet.services[name].metrics_address] for name, job in _JOBS.items()}
    return {**targets, "worker": [worker.metrics_address for worker in fleet.workers]}


def _make_traffic(gateway: str, ca: Path, workers: list[str], prometheus: Prometheus) -> None:
    """Adapters arrive one after the other, and a scrape sees their counters before they grow again."""
    names = sorted(SKILLS)
    with Client(gateway, ca=ca) as client:
        for number, name in enumerate(names, 1):
            client.adapters.push(name, DEMO / "adapters" / name)
            prometheus.until(f"loraplex_store_adapters >= {number}")
            asyncio.run(_crowd(gateway, ca, ["", *names[:number]], requests=8 * number))
            prometheus.until_scraped(NUM_TARGETS)
    asyncio.run(_crowd(gateway, ca, ["", *names], requests=96))
    prometheus.until_scraped(NUM_TARGETS)
    _pin_one(workers)
    prometheus.until("sum(loraplex_adapter_pinned_count) == 1")
    for record in ("request_error_ratio:rate5m", "warm_first_token_slow_ratio:rate30m"):
        prometheus.until(f"loraplex:{record}")


def _pin_one(workers: list[str]) -> None:
    """An adapter that is in pages stays there."""
    for worker in workers:
        with grpc.insecure_channel(worker) as channel:
            stub = memory_pb2_grpc.MemoryServiceStub(channel)
            resident = stub.ListResident(memory_pb2.ListResidentRequest(), timeout=100.0)
            there = [adapter for adapter in resident.adapters if adapter.tier == types_pb2.TIER_PAGES]
            if there:
                stub.Pin(memory_pb2.PinRequest(adapter_version=there[0].adapter_version), timeout=100.0)
                return
    raise AssertionError("no adapter is in pages")


async def _crowd(gateway: str, ca: Path, adapters: list[str], requests: int) -> None:
    """Many requests at once, one of them for an adapter that does not exist."""
    async with AsyncClient(gateway, ca=ca) as client:
        calls = [
            client.generate(
                prompt_for("streams"), adapters[number % len(adapters)], max_tokens=24, ignore_eos=True, timeout=100.0
            )
            for number in range(requests)
        ]
        with pytest.raises(LoraplexError):
            await client.generate("x", "nobody", timeout=100.0)
        await asyncio.gather(*calls)
