"""Our engine in this process: the one of `gpu_worker`, with its loader, host tier and batcher; no wire and no face."""

import os
import queue
import time
from collections.abc import Callable

import torch

from benchmarks.serving.fixture import TENANT, Fixture
from benchmarks.serving.outcome import Outcome, peak_rss_bytes, reset_peak_rss
from benchmarks.serving.workload import BASE, Request, Workload
from gpu_worker import engine_main
from gpu_worker.commands import Arrival
from gpu_worker.config import EngineConfig
from gpu_worker.engine import Engine
from loraplex.v1 import engine_pb2, scheduler_pb2, types_pb2

# Room for every adapter of the workloads and for all sequences at once.
MEMORY = {"S": "1GiB", "M": "4GiB"}
# Only a bug makes a load take this long.
LOAD_SECONDS = 60.0

Build = Callable[[EngineConfig, engine_main.Inbox], tuple[Engine, engine_pb2.EngineReady]]


class EngineSystem:
    """Steps as `engine_main.serve` does; a token is there when the step that drew it has returned."""

    def __init__(self, fixture: Fixture, threads: int, memory: str = "", build: Build = engine_main.build) -> None:
        torch.set_num_threads(threads)
        self._fixture = fixture
        self._inbox: engine_main.Inbox = queue.SimpleQueue()
        config = EngineConfig(model=fixture.base, memory=memory or MEMORY[fixture.model], threads=threads)
        self.engine, self.ready = build(config, self._inbox)
        self._versions: dict[str, int] = {}
        self._runs = 0
        self.stats: list[engine_pb2.StepStats] = []

    def run(self, workload: Workload, how: str = "") -> Outcome:
        self._runs += 1
        self.stats = []
        pids = [os.getpid()]
        reset_peak_rss(pids)
        offers = self._offers(workload)
        tokens: list[list[int]] = [[] for _ in workload.requests]
        times: list[list[float]] = [[] for _ in workload.requests]
        unfinished = len(tokens)
        arrivals: list[Arrival] = [engine_pb2.EngineCommand(scheduler_commands=offers)]
        started = time.perf_counter()
        while unfinished:
            events = self.engine.step(arrivals)
            now = time.perf_counter() - started
            arrivals = []
            for event in events:
                unfinished -= _note(event.step, tokens, times, now)
                arrivals += self._fetched(event.step)
                if event.step.HasField("stats"):
                    self.stats.append(event.step.stats)
            while not self._inbox.empty():
                arrivals += self._arrived()
            if unfinished and not arrivals and not self.engine.busy:
                arrivals += self._arrived(LOAD_SECONDS)
        seconds = time.perf_counter() - started
        return Outcome(seconds, tuple(map(tuple, tokens)), tuple(map(tuple, times)), peak_rss_bytes(pids))

    def close(self) -> None:
        """Nothing outlives the process."""

    def _offers(self, workload: Workload) -> scheduler_pb2.CommandBatch:
        """Each run is a new epoch: its commands count from 1."""
        offers = [
            scheduler_pb2.Offer(request=self._spec(index, request), order_key=index)
            for index, request in enumerate(workload.requests)
        ]
        commands = [scheduler_pb2.Command(seq=seq, offer=offer) for seq, offer in enumerate(offers, 1)]
        return scheduler_pb2.CommandBatch(scheduler_epoch=self._runs, commands=commands)

    def _spec(self, index: int, request: Request) -> types_pb2.RequestSpec:
        spec = types_pb2.RequestSpec(
            key=types_pb2.RequestKey(request_id=str(index), attempt=self._runs, tenant=TENANT),
            gateway_id="bench",
            # A run finds nothing that an earlier one left in the prefix cache.
            isolation_salt=str(self._runs),
            prompt_token_ids=request.prompt,
            sampling=types_pb2.SamplingParams(temperature=0.0, seed=0),
            stopping=types_pb2.StoppingParams(max_tokens=request.output_tokens, ignore_eos=True),
        )
        if request.adapter != BASE:
            fetched = self._fixture.fetched(request.adapter)
            self._versions[fetched.adapter_version] = request.adapter
            spec.adapter_version, spec.adapter_bytes = fetched.adapter_version, fetched.layout.total_bytes
        return spec

    def _fetched(self, step: engine_pb2.StepResult) -> list[Arrival]:
        """The store's file is on this machine: what the engine asks for is there."""
        return [
            engine_pb2.EngineCommand(adapter_fetched=self._fixture.fetched(self._versions[needed.adapter_version]))
            for needed in step.adapters_needed
        ]

    def _arrived(self, timeout: float | None = None) -> list[Arrival]:
        arrival = self._inbox.get(timeout=timeout)
        return [] if arrival is None else [arrival]


def _note(step: engine_pb2.StepResult, tokens: list[list[int]], times: list[list[float]], now: float) -> int:
    """Books a step's tokens; returns how many requests ended. Raises RuntimeError when one failed."""
    ended = 0
    for batch in step.tokens:
        for sequence in batch.sequences:
            index = int(sequence.key.request_id)
            tokens[index] += sequence.token_ids
            times[index] += [now] * len(sequence.token_ids)
            if sequence.finish_reason:
                ended += 1
                if sequence.finish_reason != types_pb2.FINISH_REASON_LENGTH:
                    raise RuntimeError(f"request {index} ended by itself: {sequence}")
    return ended
