"""Tokens a second with a few adapters and with thousands: real pages, loads, batches and graphs, without the services.

Requests all wait at the start; adapters are drawn by Zipf's law, as in workload W of `benchmarks/serving`. Every
adapter is in pinned memory of the host when it starts. There are BODIES byte strings that the adapters take in turn, so
that two thousand fit into any host: what is copied, and where to, is the same.
"""

import queue
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.gpu import goals
from benchmarks.gpu.inputs import fill_adapters, layout_of
from benchmarks.gpu.shapes import PAGE_SIZE, ModelShape
from common.packing import PackedLayout
from gpu_worker.batching import Batcher, Chunk
from gpu_worker.cuda.executor import Executor, call_again
from gpu_worker.loader import LoadDone, Loader
from gpu_worker.memory.geometry import PageGeometry
from gpu_worker.memory.manager import MemoryManager
from gpu_worker.memory.pool import PagePool
from gpu_worker.model_runner import ModelRunner
from gpu_worker.models.decoder import Decoder
from gpu_worker.prefetch import Prefetcher
from gpu_worker.sequence import SamplingParams, StoppingParams
from gpu_worker.sequence import Sequence as Running
from gpu_worker.step_output import StepOutput
from kernels import dispatch
from kernels.cpu.pages import Watch

ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj")
BODIES = 32
# Of what is free behind the weights and the largest step.
POOL_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class Load:
    """`counts` of adapters are compared, in turn, `rounds` times; lengths are drawn from [least, most]."""

    requests: int
    counts: tuple[int, int]
    prompt: tuple[int, int]
    output: tuple[int, int]
    lora_rank: int
    max_sequences: int
    max_step_tokens: int
    rounds: int


FULL = Load(512, (5, 2000), (16, 512), (64, 256), 16, max_sequences=128, max_step_tokens=2048, rounds=2)
TINY = Load(4, (2, 4), (3, 9), (2, 3), 2, max_sequences=3, max_step_tokens=8, rounds=1)
TINY_PAGES = 48


def draw(load: Load, adapters: int, vocab: int, seed: int) -> list[Running]:
    """The lengths and prompts of a seed are the same for any number of adapters."""
    lengths, owners = np.random.default_rng(seed), np.random.default_rng([seed, adapters])
    share = 1 / np.arange(1, adapters + 1)
    requests = []
    for number in range(load.requests):
        prompt = lengths.integers(0, vocab, lengths.integers(load.prompt[0], load.prompt[1] + 1))
        output = int(lengths.integers(load.output[0], load.output[1] + 1))
        owner = owners.choice(adapters, p=share / share.sum())
        requests.append(request(number, prompt.tolist(), output, f"adapter {owner}"))
    return requests


def request(number: int, prompt: list[int], output: int, adapter: str) -> Running:
    return Running(
        request_id=str(number),
        attempt=0,
        tenant="",
        gateway_id="",
        order_key=number,
        prompt_token_ids=prompt,
        output_token_ids=[],
        num_delivered=0,
        sampling=SamplingParams(temperature=0.0, seed=0),
        stopping=StoppingParams(output, 0, frozenset()),
        adapter_version=adapter,
    )


@dataclass(slots=True)
class Body:
    """An adapter in host memory."""

    source: PagePool
    pages: list[int]
    num_bytes: int

    def copy_to(self, pool: PagePool, pages: list[int], watch: Watch | None = None) -> None:
        pool.copy_pages(pages, self.source, self.pages)

    def close(self) -> None:
        """The memory is the library's."""


class Library:
    """The host tier, as far as a prefetcher asks: every adapter is there, and all have one layout."""

    limit_bytes = 1 << 62

    def __init__(self, geometry: PageGeometry, layout: PackedLayout, dtype: torch.dtype, *, pinned: bool) -> None:
        self._layout = layout
        self._pages = geometry.pages_for_bytes(layout.total_bytes)
        self._source = PagePool(geometry, BODIES * self._pages, "cpu", pinned=pinned)
        fill_adapters(self._source.bytes, dtype, torch.Generator().manual_seed(1))

    def layout(self, adapter_version: str) -> PackedLayout:
        return self._layout

    def keep(self, adapter_versions: object) -> None:
        """Nothing leaves."""

    def body(self, adapter_version: str) -> Body:
        first = int(adapter_version.split()[1]) % BODIES * self._pages
        return Body(self._source, list(range(first, first + self._pages)), self._layout.total_bytes)


@dataclass(frozen=True, slots=True)
class Served:
    """What a run came to."""

    tokens: int
    seconds: float
    steps: int
    loads: int
    evictions: int


@dataclass(frozen=True, slots=True)
class _Flight:
    number: int
    chunks: Sequence[Chunk]
    output: Callable[[], StepOutput]


class Server:
    """The engine's loop without its messages: plan, launch, and handle the step before meanwhile."""

    def __init__(
        self, load: Load, executor: Executor, pool: PagePool, geometry: PageGeometry, library: Library, vocab: int
    ) -> None:
        self._memory = MemoryManager(geometry, len(pool.bytes) - 1)
        self._library = library
        self._batcher = Batcher(
            self._memory, library.layout, max_step_tokens=load.max_step_tokens, max_sequences=load.max_sequences
        )
        host: Any = library
        self._prefetcher = Prefetcher(self._batcher, self._memory, host)
        self._runner = ModelRunner(executor, self._memory, pool, "cpu", vocab)
        self._done: queue.SimpleQueue[LoadDone] = queue.SimpleQueue()
        self._loader = Loader(pool, self._done.put)
        self._step = self._loads = self._loading = self._tokens = 0
        self._short = False

    def run(self, requests: Sequence[Running]) -> Served:
        """Raises RuntimeError when nothing moves any more."""
        started = time.perf_counter()
        for one in requests:
            self._batcher.add(one)
        flight: _Flight | None = None
        while flight or self._batcher.num_waiting or self._batcher.num_running:
            before, flight = flight, None
            if before and self._short:
                self._handle(before)
                before = None
            flight = self._launch(in_flight=before is not None)
            if before:
                self._handle(before)
            elif flight is None and not self._receive(wait=True):
                raise RuntimeError("sequences wait, and nothing runs or loads")
        seconds = time.perf_counter() - started
        self._loader.stop()
        self._memory.check_integrity()
        return Served(self._tokens, seconds, self._step, self._loads, self._memory.evictions)

    def _receive(self, *, wait: bool) -> bool:
        """Books the copies that have ended, after one of them if `wait`; whether there were any to wait for."""
        under_way = self._loading > 0
        while (wait and under_way) or not self._done.empty():
            done = self._done.get()
            wait = False
            if done.failure:
                raise RuntimeError(f"{done.adapter_version}: {done.failure}")
            self._loading -= 1
            self._memory.finish_loading(done.adapter_version, done.seconds)
            self._batcher.adapter_loaded(done.adapter_version)
        return under_way

    def _launch(self, *, in_flight: bool) -> _Flight | None:
        self._receive(wait=False)
        plan = self._batcher.plan(self._step, in_flight=in_flight)
        self._short = plan.short
        for version in (*plan.loads, *self._prefetcher.plan().loads):
            adapter = self._memory.adapters.get(version)
            assert adapter is not None
            self._loader.load(version, self._library.body(version), adapter.pages)
            self._loads += 1
            self._loading += 1
        if not plan.chunks:
            return None
        self._step += 1
        output = self._runner.launch(plan.chunks, self._step)
        for chunk in plan.chunks:
            self._batcher.launch(chunk)
        return _Flight(self._step, plan.chunks, output)

    def _handle(self, flight: _Flight) -> None:
        output = flight.output()
        self._memory.complete(flight.number)
        for chunk in flight.chunks:
            sequence = chunk.sequence
            if sequence.finished:
                continue
            self._batcher.complete(chunk)
            sequence.pending_tokens -= chunk.samples
            draw = output.draws.get(sequence.sequence_id)
            if draw is None:
                continue
            if not draw.finite:
                raise ArithmeticError(f"logits of request {sequence.request_id} are not finite")
            sequence.output_token_ids.append(draw.token_id)
            self._tokens += 1
            if sequence.is_full(len(sequence.output_token_ids)):
                self._batcher.remove(sequence, self._step)


def _placed(decoder: Decoder, geometry: PageGeometry, load: Load) -> tuple[PagePool, Executor]:
    if decoder.device.type == "cuda":
        from gpu_worker.cuda.place import place, profiled_pool_bytes

        room = profiled_pool_bytes(decoder, geometry, POOL_SHARE, load.max_step_tokens, load.max_sequences)
        return place(decoder, geometry, room // geometry.page_bytes - 1, load.max_sequences)
    pool = PagePool(geometry, TINY_PAGES + 1, "cpu")
    return pool, Executor(decoder, pool.kv_pages(decoder.dtype), TINY_PAGES, load.max_sequences, call_again)


def rows(name: str, model: ModelShape, decoder: Decoder, load: Load) -> Iterator[dict[str, object]]:
    """One a run, then the ratio of all runs."""
    is_tiny, dtype = decoder.device.type == "cpu", decoder.dtype
    geometry = PageGeometry(model.layers, model.kv_heads, model.head_dim, dtype.itemsize, PAGE_SIZE)
    library = Library(geometry, layout_of(model, load.lora_rank, dtype, ADAPTED), dtype, pinned=not is_tiny)
    served: dict[int, list[Served]] = {count: [] for count in load.counts}
    with dispatch.force("triton" if is_tiny else ""):
        pool, executor = _placed(decoder, geometry, load)

        def run(requests: Sequence[Running]) -> Served:
            return Server(load, executor, pool, geometry, library, model.vocab).run(requests)

        # Every width of a batch once, from the widest down: graphs are captured and kernels compiled before it counts.
        run([request(n, [n % model.vocab], 2 + n, "adapter 0") for n in range(load.max_sequences)])
        for seed in range(load.rounds):
            for count in load.counts:
                served[count].append(run(draw(load, count, model.vocab, seed)))
                yield _row(f"{name} {load.requests} requests, {count} adapters, round {seed}", [served[count][-1]])
    few, many = (_tokens_per_second(served[count]) for count in load.counts)
    case = f"{name} {load.requests} requests, {load.counts[1]} adapters over {load.counts[0]}"
    yield {**_row(case, served[load.counts[1]]), **goals.at_least("throughput_share", many / few, 0.95)}


def _tokens_per_second(runs: Sequence[Served]) -> float:
    return sum(run.tokens for run in runs) / sum(run.seconds for run in runs)


def _row(case: str, runs: Sequence[Served]) -> dict[str, object]:
    counted = {field: sum(getattr(run, field) for run in runs) for field in ("tokens", "steps", "loads", "evictions")}
    return {"op": "serving", "case": case, "tokens_per_second": round(_tokens_per_second(runs), 1), **counted}
