"""(a) and (e): the real engine under Poisson arrivals, with more adapters than fit and a throttled copier.

What fits is one pool: twelve adapters of mixed ranks and the KV of eight sequences. A request is 32 tokens of prompt
and 32 of answer for an adapter drawn from those in play, evenly or by Zipf's law. Time to first token counts from the
moment it should have arrived. All adapters are in the host tier: what is waited for is the way into pages.
"""

import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.baselines.fixed_slots import BlockingLoader, LeastRecentSlots, NoPrefetch, ThrottledLoader
from benchmarks.memory.fixture import PAGES, Adapter
from benchmarks.memory.replay import zipf
from gpu_worker import engine, engine_main
from gpu_worker.config import EngineConfig
from gpu_worker.memory.manager import MemoryManager
from gpu_worker.prefetch import Prefetcher
from loraplex.v1 import engine_pb2, scheduler_pb2, types_pb2

FITTING = 12
MULTIPLES = (1, 2, 4, 8)
RATIOS = (0.25, 5.0)
# The last has pages for all that are in play: what more adapters in a batch cost when none is ever loaded.
SYSTEMS = ("loraplex", "no-prefetch", "slots-lru-blocking", "all-fit")
MAX_SEQUENCES, PROMPT_TOKENS, OUTPUT_TOKENS = 8, 32, 32
LOAD = 0.7
POPULARITIES: dict[str, Callable[[int], list[float]]] = {
    "uniform": lambda count: [1.0] * count,
    "zipf-1.0": lambda count: zipf(1.0, count),
}
# load / step, popularity, multiple, system
Case = tuple[float, str, int, str]
KV_PAGES = MAX_SEQUENCES * PAGES.pages_for_tokens(PROMPT_TOKENS + OUTPUT_TOKENS)


@dataclass(frozen=True, slots=True)
class Options:
    """What is measured; `seconds` is how long the arrivals of each run go on."""

    seconds: float = 4.0
    rounds: int = 1
    # Of the two cases that a goal compares, where they are among those measured: runs of seconds near saturation vary.
    compared_rounds: int = 8
    ratios: Sequence[float] = RATIOS
    multiples: Sequence[int] = MULTIPLES
    systems: Sequence[str] = SYSTEMS
    popularities: Sequence[str] = tuple(POPULARITIES)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Seconds of each request."""

    ttft: list[float]
    adapter_wait: list[float]
    # Steps without a prompt in them, and all of them.
    decode_steps: list[float]
    steps: list[float]
    loads: int
    load_seconds: list[float]
    seconds: float


class Driver:
    """An engine in this process; requests arrive when their time has come."""

    def __init__(self, base: Path, adapters: Sequence[Adapter], system: str, bytes_per_second: float) -> None:
        self._adapters = adapters
        self._inbox: engine_main.Inbox = queue.SimpleQueue()
        fitting = adapters if system == "all-fit" else adapters[:FITTING]
        adapter_pages = sum(adapter.num_pages for adapter in fitting)
        blocking = system == "slots-lru-blocking"
        loader = type(
            "Throttled", (BlockingLoader if blocking else ThrottledLoader,), {"bytes_per_second": bytes_per_second}
        )
        slots = {"adapter_pages": adapter_pages, "slot_pages": max(adapter.num_pages for adapter in adapters)}
        manager = type("Slots", (LeastRecentSlots,), slots) if blocking else MemoryManager
        prefetcher = Prefetcher if system in ("loraplex", "all-fit") else NoPrefetch
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
        if system == "all-fit":
            for adapter in adapters:
                prefetch = engine_pb2.AdapterCommand(tenant="default", adapter_version=adapter.version)
                self._engine.step([engine_pb2.EngineCommand(memory=engine_pb2.MemoryCommand(prefetch=prefetch))])
        self._epoch = 1

    def run(self, arrivals: Sequence[float], weights: Sequence[float], seed: int) -> Outcome:
        """`arrivals` in seconds from now on; a thread of their own brings them, as one does in the engine process."""
        rng = np.random.default_rng(seed)
        chosen = rng.choice(len(weights), size=len(arrivals), p=np.array(weights) / sum(weights))
        self._epoch += 1
        offers = [self._offer(index, self._adapters[adapter], rng) for index, adapter in enumerate(chosen.tolist())]
        first, waited = [0.0] * len(arrivals), [0.0] * len(arrivals)
        steps, every, loads = list[float](), list[float](), list[float]()
        unfinished, started = len(arrivals), time.perf_counter()
        feeder = threading.Thread(target=self._feed, args=(offers, arrivals, started))
        feeder.start()
        while unfinished:
            commands = engine_main.arrivals(self._inbox, self._engine)
            begun = time.perf_counter()
            events = self._engine.step(commands or ())
            every.append(time.perf_counter() - begun)
            for event in events:
                at = time.perf_counter() - started
                loads += [load.seconds for load in event.step.loads]
                if event.step.HasField("stats") and not event.step.stats.prefill_tokens:
                    steps.append(event.step.stats.forward_seconds + event.step.stats.sample_seconds)
                unfinished -= _book(event.step, arrivals, at, first, waited)
        feeder.join()
        return Outcome(first, waited, steps, every, len(loads), loads, time.perf_counter() - started)

    def _feed(self, offers: Sequence[engine_pb2.EngineCommand], arrivals: Sequence[float], started: float) -> None:
        for offer, moment in zip(offers, arrivals, strict=True):
            time.sleep(max(0.0, started + moment - time.perf_counter()))
            engine_main.receive(offer, self._inbox, self._engine)

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


def rows(base: Path, adapters: Sequence[Adapter], options: Options) -> list[dict[str, Any]]:
    """One row for each ratio, popularity, multiple and system; the runs of a round are of the same arrivals.

    Each round asks anew what the machine can do now: 70 % of yesterday's capacity may be 80 % of today's.
    """
    _, step = _calibrate(base, adapters)
    median_bytes = float(np.median([adapter.layout.total_bytes for adapter in adapters]))
    cases = list(product(options.ratios, options.popularities, options.multiples, options.systems))
    runs: dict[Case, list[Outcome]] = {case: [] for case in cases}
    rates = []
    for number in range(max(options.rounds, options.compared_rounds)):
        due = [case for case in cases if number < (options.compared_rounds if _compared(case) else options.rounds)]
        if not due:
            break
        rates.append(_calibrate(base, adapters)[0])
        arrivals = _poisson(LOAD * rates[-1], options.seconds, seed=5 + number)
        for done, (ratio, popularity, multiple, system) in enumerate(due):
            _say(f"round {number + 1}, {done + 1} of {len(due)}: {ratio} {popularity} {multiple}x {system}")
            driver = Driver(base, adapters, system, median_bytes / (ratio * step))
            weights = POPULARITIES[popularity](FITTING * multiple)
            # The pool is full of something before anything counts.
            driver.run([0.0] * (2 * FITTING), weights, seed=7)
            runs[ratio, popularity, multiple, system].append(driver.run(arrivals, weights, seed=11 + number))
    capacity = float(np.median(rates))
    about = {
        "requests_per_second": round(LOAD * capacity, 1),
        "capacity_requests_per_second": round(capacity, 1),
        "decode_step_ms": round(1e3 * step, 3),
    }
    return [_row(*case, outcomes, runs.get((*case[:2], 1, case[3]), [])) | about for case, outcomes in runs.items()]


def _compared(case: Case) -> bool:
    """The goal: loads of a quarter of a step, 4x the adapters that fit, against 1x and against a pool for all."""
    ratio, _, multiple, system = case
    return ratio < 1 and multiple in (1, 4) and system in ("loraplex", "all-fit")


def _say(line: str) -> None:
    """How far a run of minutes is."""
    print(line, file=sys.stderr, flush=True)


def capacity_rows(base: Path, adapters: Sequence[Adapter], options: Options) -> list[dict[str, Any]]:
    """Requests a second when all are there at once: what a multiple costs, whatever the arrivals are."""
    _, step = _calibrate(base, adapters)
    median_bytes = float(np.median([adapter.layout.total_bytes for adapter in adapters]))
    found = []
    for ratio, multiple in product(options.ratios, options.multiples):
        _say(f"capacity: {ratio} {multiple}x")
        driver = Driver(base, adapters, "loraplex", median_bytes / (ratio * step))
        weights = [1.0] * (FITTING * multiple)
        driver.run([0.0] * 60, weights, seed=1)
        rates = [200 / driver.run([0.0] * 200, weights, seed=seed).seconds for seed in (2, 3, 4)]
        found.append(
            {
                "part": "capacity",
                "load_to_step_ratio": ratio,
                "multiple": multiple,
                "requests_per_second": round(float(np.median(rates)), 1),
                "requests_per_second_runs": [round(rate, 1) for rate in rates],
            }
        )
    return found


def _calibrate(base: Path, adapters: Sequence[Adapter]) -> tuple[float, float]:
    """Requests a second that the engine answers with what fits, all of them there at once; seconds of a decode step."""
    driver, weights = Driver(base, adapters, "loraplex", float("inf")), [1.0] * FITTING
    driver.run([0.0] * 100, weights, seed=1)
    outcomes = [driver.run([0.0] * 200, weights, seed=seed) for seed in (2, 3, 4)]
    capacity = float(np.median([200 / outcome.seconds for outcome in outcomes]))
    return capacity, float(np.median([step for outcome in outcomes for step in outcome.decode_steps]))


def _poisson(rate: float, seconds: float, seed: int) -> list[float]:
    gaps = np.random.default_rng(seed).exponential(1 / rate, size=int(rate * seconds))
    return [float(moment) for moment in np.cumsum(gaps)]


def _row(
    ratio: float, popularity: str, multiple: int, system: str, outcomes: Sequence[Outcome], fit: Sequence[Outcome]
) -> dict[str, Any]:
    """The median of the runs of each figure; of the one that counts every run too, and over the run of 1x beside it."""

    def milliseconds(values: Callable[[Outcome], Sequence[float]], percentile: float) -> list[float]:
        own = (values(outcome) or [0.0] for outcome in outcomes)
        return [round(1e3 * float(np.percentile(seconds, percentile)), 3) for seconds in own]

    def median(values: Sequence[float]) -> float:
        return round(float(np.median(values)), 3)

    first = milliseconds(lambda outcome: outcome.ttft, 50)
    growth = [
        round(float(np.median(outcome.ttft) / np.median(beside.ttft)), 3)
        for outcome, beside in zip(outcomes, fit, strict=False)
    ]
    return {
        "part": "wait",
        "system": system,
        "popularity": popularity,
        "load_to_step_ratio": ratio,
        "active_adapters": multiple * FITTING,
        "multiple": multiple,
        "runs": len(outcomes),
        "requests": len(outcomes[0].ttft),
        "ttft_p50_ms": median(first),
        "ttft_p50_ms_runs": first,
        "ttft_p50_growth": median(growth) if growth else None,
        "ttft_p50_growth_runs": growth,
        "ttft_p99_ms": median(milliseconds(lambda outcome: outcome.ttft, 99)),
        "adapter_wait_p50_ms": median(milliseconds(lambda outcome: outcome.adapter_wait, 50)),
        "adapter_wait_p90_ms": median(milliseconds(lambda outcome: outcome.adapter_wait, 90)),
        "adapter_wait_seconds": median([sum(outcome.adapter_wait) for outcome in outcomes]),
        "step_mean_ms": median([1e3 * float(np.mean(outcome.steps)) for outcome in outcomes]),
        "loads": int(np.median([outcome.loads for outcome in outcomes])),
        "load_median_ms": median(milliseconds(lambda outcome: outcome.load_seconds, 50)),
    }
