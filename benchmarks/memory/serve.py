"""(a) and (e): the real engine under Poisson arrivals, with more adapters than fit and a throttled copier.

What fits is one pool: twelve adapters of mixed ranks and the KV of eight sequences. A request is 32 tokens of prompt
and 32 of answer for an adapter drawn evenly from those in play. Time to first token counts from the moment it should
have arrived. All adapters are in the host tier: what is waited for is the way into pages.
"""

import queue
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.baselines.fixed_slots import BlockingLoader, LeastRecentSlots, NoPrefetch, ThrottledLoader
from benchmarks.memory.fixture import PAGES, Adapter
from gpu_worker import engine, engine_main
from gpu_worker.commands import Arrival
from gpu_worker.config import EngineConfig
from gpu_worker.memory.manager import MemoryManager
from gpu_worker.prefetch import Prefetcher
from loraplex.v1 import engine_pb2, scheduler_pb2, types_pb2

FITTING = 12
MULTIPLES = (1, 2, 4, 8)
RATIOS = (0.25, 5.0)
SYSTEMS = ("loraplex", "no-prefetch", "slots-lru-blocking")
MAX_SEQUENCES, PROMPT_TOKENS, OUTPUT_TOKENS = 8, 32, 32
LOAD = 0.7
KV_PAGES = MAX_SEQUENCES * PAGES.pages_for_tokens(PROMPT_TOKENS + OUTPUT_TOKENS)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Seconds of each request."""

    ttft: list[float]
    adapter_wait: list[float]
    decode_steps: list[float]
    loads: int
    load_seconds: list[float]
    seconds: float


class Driver:
    """An engine in this process; requests arrive when their time has come."""

    def __init__(self, base: Path, adapters: Sequence[Adapter], system: str, bytes_per_second: float) -> None:
        self._adapters = adapters
        self._inbox: engine_main.Inbox = queue.SimpleQueue()
        adapter_pages = sum(adapter.num_pages for adapter in adapters[:FITTING])
        blocking = system == "slots-lru-blocking"
        loader = type(
            "Throttled", (BlockingLoader if blocking else ThrottledLoader,), {"bytes_per_second": bytes_per_second}
        )
        slots = {"adapter_pages": adapter_pages, "slot_pages": max(adapter.num_pages for adapter in adapters)}
        manager = type("Slots", (LeastRecentSlots,), slots) if blocking else MemoryManager
        prefetcher = Prefetcher if system == "loraplex" else NoPrefetch
        config = EngineConfig(
            model=base,
            memory=str((adapter_pages + KV_PAGES) * PAGES.page_bytes),
            max_sequences=MAX_SEQUENCES,
            threads=1,
        )
        with (
            mock.patch.multiple(engine_main, Loader=loader, MemoryManager=manager),
            mock.patch.object(engine, "Prefetcher", prefetcher),
        ):
            self._engine, _ = engine_main.build(config, self._inbox)
        self._engine.step([engine_pb2.EngineCommand(adapter_fetched=adapter.fetched()) for adapter in adapters])
        self._epoch = 1

    def run(self, arrivals: Sequence[float], active: int, seed: int) -> Outcome:
        """`arrivals` in seconds from now on."""
        rng = np.random.default_rng(seed)
        chosen = rng.integers(active, size=len(arrivals))
        self._epoch += 1
        first, waited, steps, loads = [0.0] * len(arrivals), [0.0] * len(arrivals), list[float](), list[float]()
        unfinished, sent, started = len(arrivals), 0, time.perf_counter()
        while unfinished:
            now = time.perf_counter() - started
            commands: list[Arrival] = []
            while sent < len(arrivals) and arrivals[sent] <= now:
                commands.append(self._offer(sent, self._adapters[chosen[sent]], rng))
                sent += 1
            if not commands and not self._engine.busy:
                commands += self._wait(arrivals[sent] - now if sent < len(arrivals) else None)
            while not self._inbox.empty():
                commands += self._wait(None)
            for event in self._engine.step(commands):
                at = time.perf_counter() - started
                loads += [load.seconds for load in event.step.loads]
                if event.step.HasField("stats") and not event.step.stats.prefill_tokens:
                    steps.append(event.step.stats.forward_seconds + event.step.stats.sample_seconds)
                unfinished -= _book(event.step, arrivals, at, first, waited)
        return Outcome(first, waited, steps, len(loads), loads, time.perf_counter() - started)

    def _offer(self, index: int, adapter: Adapter, rng: np.random.Generator) -> engine_pb2.EngineCommand:
        spec = types_pb2.RequestSpec(
            key=types_pb2.RequestKey(request_id=str(index), attempt=self._epoch, tenant="default"),
            gateway_id="bench",
            adapter_version=adapter.version,
            adapter_bytes=adapter.layout.total_bytes,
            prompt_token_ids=rng.integers(3, 2048, PROMPT_TOKENS).tolist(),
            sampling=types_pb2.SamplingParams(temperature=0.0, seed=0),
            stopping=types_pb2.StoppingParams(max_tokens=OUTPUT_TOKENS, ignore_eos=True),
        )
        command = scheduler_pb2.Command(seq=index + 1, offer=scheduler_pb2.Offer(request=spec, order_key=index))
        batch = scheduler_pb2.CommandBatch(scheduler_epoch=self._epoch, commands=[command])
        return engine_pb2.EngineCommand(scheduler_commands=batch)

    def _wait(self, seconds: float | None) -> list[Arrival]:
        try:
            arrival = self._inbox.get(timeout=None if seconds is None else max(0.0, seconds))
        except queue.Empty:
            return []
        return [] if arrival is None else [arrival]


def _book(
    step: engine_pb2.StepResult, arrivals: Sequence[float], at: float, first: list[float], waited: list[float]
) -> int:
    """How many requests ended. Raises RuntimeError when one failed."""
    ended = 0
    for batch in step.tokens:
        for sequence in batch.sequences:
            index = int(sequence.key.request_id)
            first[index] = first[index] or at - arrivals[index]
            if sequence.finish_reason:
                if sequence.finish_reason != types_pb2.FINISH_REASON_LENGTH:
                    raise RuntimeError(f"request {index} failed: {sequence.error}")
                waited[index] = sequence.usage.load_seconds
                ended += 1
    return ended


def rows(base: Path, adapters: Sequence[Adapter], seconds: float, ratios: Sequence[float]) -> list[dict[str, Any]]:
    """One row for each ratio, multiple and system. `seconds` is how long each run's arrivals go on."""
    capacity, step = _calibrate(base, adapters)
    median_bytes = float(np.median([adapter.layout.total_bytes for adapter in adapters]))
    arrivals = _poisson(LOAD * capacity, seconds)
    found = []
    for ratio in ratios:
        for multiple in MULTIPLES:
            for system in SYSTEMS:
                driver = Driver(base, adapters, system, median_bytes / (ratio * step))
                # The pool is full of something before anything counts.
                driver.run([0.0] * (2 * FITTING), FITTING * multiple, seed=7)
                outcome = driver.run(arrivals, FITTING * multiple, seed=11)
                found.append(_row(system, ratio, multiple, outcome, capacity, step))
    return found


def _calibrate(base: Path, adapters: Sequence[Adapter]) -> tuple[float, float]:
    """Requests a second that the engine answers with what fits, all of them there at once; seconds of a decode step."""
    driver = Driver(base, adapters, "loraplex", float("inf"))
    driver.run([0.0] * 100, FITTING, seed=1)
    outcomes = [driver.run([0.0] * 200, FITTING, seed=seed) for seed in (2, 3, 4)]
    capacity = float(np.median([200 / outcome.seconds for outcome in outcomes]))
    return capacity, float(np.median([step for outcome in outcomes for step in outcome.decode_steps]))


def _poisson(rate: float, seconds: float) -> list[float]:
    gaps = np.random.default_rng(5).exponential(1 / rate, size=int(rate * seconds))
    return [float(moment) for moment in np.cumsum(gaps)]


def _row(system: str, ratio: float, multiple: int, outcome: Outcome, capacity: float, step: float) -> dict[str, Any]:
    def milliseconds(values: Sequence[float], percentile: float) -> float:
        return round(1e3 * float(np.percentile(values, percentile)), 3) if len(values) else 0.0

    return {
        "part": "wait",
        "system": system,
        "load_to_step_ratio": ratio,
        "active_adapters": multiple * FITTING,
        "multiple": multiple,
        "requests": len(outcome.ttft),
        "requests_per_second": round(LOAD * capacity, 1),
        "capacity_requests_per_second": round(capacity, 1),
        "decode_step_ms": round(1e3 * step, 3),
        "ttft_p50_ms": milliseconds(outcome.ttft, 50),
        "ttft_p99_ms": milliseconds(outcome.ttft, 99),
        "adapter_wait_p50_ms": milliseconds(outcome.adapter_wait, 50),
        "adapter_wait_p90_ms": milliseconds(outcome.adapter_wait, 90),
        "adapter_wait_seconds": round(sum(outcome.adapter_wait), 3),
        "loads": outcome.loads,
        "load_median_ms": milliseconds(outcome.load_seconds, 50),
    }
