"""Drives a real engine in this process as `engine_main.serve` does, and remembers what it said."""

import queue
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from common.errors import NotFound, to_proto
from gpu_worker import engine_main
from gpu_worker.commands import Arrival
from gpu_worker.config import EngineConfig
from gpu_worker.loader import LoadDone
from loraplex.v1 import engine_pb2, scheduler_pb2, types_pb2, worker_pb2
from tests.gpu_worker.step_modes import IN_TURN
from tests.gpu_worker.tiny_model import PAGE_BYTES, TinyAdapter

# A load takes milliseconds; only a bug makes it take this long.
LOAD_SECONDS = 100.0
UNLIMITED_STEPS = 5000


class EngineDriver:
    """Plays face, scheduler and store; adapters of `library` are delivered as soon as the engine asks."""

    mode = IN_TURN

    def __init__(
        self, checkpoint: Path, library: Iterable[TinyAdapter] = (), num_pages: int = 200, **options: Any
    ) -> None:
        self._inbox: engine_main.Inbox = queue.SimpleQueue()
        defaults: dict[str, Any] = {"page_size": 4, "max_step_tokens": 128, "max_sequences": 16}
        config = EngineConfig(model=checkpoint, memory=str(num_pages * PAGE_BYTES), **(defaults | options))
        self.engine, self.ready = engine_main.build(config, self._inbox, **self.mode.options())
        self.library = {adapter.version: adapter for adapter in library}
        self.epoch = self._seq = 1
        # Keeps finished loads from the engine, as if the copying thread had not ended.
        self.hold_loads = False
        self._held: list[LoadDone] = []
        self._arrivals: list[Arrival] = []
        # By request; those of its outputs after the first are under `name/index`.
        self.tokens: dict[str, list[int]] = {}
        self.messages: list[worker_pb2.SequenceTokens] = []
        self.ended: dict[str, worker_pb2.SequenceTokens] = {}
        self.progress: dict[str, list[scheduler_pb2.RequestProgress]] = {}
        self.asked: list[str] = []
        self.stats: list[engine_pb2.StepStats] = []
        self.replies: list[engine_pb2.MemoryReply] = []
        self.snapshots: list[engine_pb2.EngineSnapshot] = []
        self.residency: list[scheduler_pb2.ResidencyDelta] = []
        self.report = scheduler_pb2.StepReport(memory=self.ready.memory)

    @property
    def memory(self) -> scheduler_pb2.MemoryUsage:
        return self.report.memory

    @property
    def preemptions(self) -> int:
        return sum(stats.preemptions for stats in self.stats)

    def send(self, **command: Any) -> None:
        """A command of the face, applied by the next step: `send(abort=...)`."""
        self._arrivals.append(engine_pb2.EngineCommand(**command))

    def arrive(self, arrivals: Iterable[Arrival]) -> None:
        """What the next step applies."""
        self._arrivals += arrivals

    def command(self, **command: Any) -> None:
        """The scheduler's next command: `command(offer=...)`."""
        numbered = scheduler_pb2.Command(seq=self._seq, **command)
        self._seq += 1
        self.send(scheduler_commands=scheduler_pb2.CommandBatch(scheduler_epoch=self.epoch, commands=[numbered]))

    def offer(self, name: str, prompt: Sequence[int], adapter: str = "", **options: Any) -> None:
        self.command(offer=new_offer(name, prompt, adapter, **options))

    def step(self) -> engine_pb2.StepResult:
        """One step with everything that has arrived."""
        while not self._inbox.empty():
            self._receive()
        arrivals, self._arrivals = self._arrivals, []
        *answers, last = self.engine.step(arrivals)
        for answer in answers:
            if answer.HasField("memory"):
                self.replies.append(answer.memory)
            else:
                self.snapshots.append(answer.snapshot)
        self._note(last.step)
        return last.step

    def run(self) -> None:
        """Steps while the engine would: until nothing has arrived, nothing is being loaded and it is not busy."""
        for _ in range(UNLIMITED_STEPS):
            self.step()
            if self._arrivals or self.engine.busy:
                continue
            self.engine.check_integrity()
            if not self.memory.loading_pages or self.hold_loads:
                return
            self._receive(LOAD_SECONDS)
        raise AssertionError("no end in sight")

    def generate(self, name: str, prompt: Sequence[int], adapter: str = "", **options: Any) -> list[int]:
        """The tokens of a sequence that runs alone from here on."""
        self.offer(name, prompt, adapter, **options)
        self.run()
        return self.tokens[name]

    def finish_loads(self) -> None:
        """Lets the engine know of the loads that were held back."""
        self.hold_loads = False
        self._arrivals += self._held
        self._held = []

    def wait_for_load(self) -> None:
        """Until the copying thread has ended a load."""
        self._receive(LOAD_SECONDS)

    def _receive(self, timeout: float | None = None) -> None:
        arrival = self._inbox.get(timeout=timeout)
        assert arrival is not None
        if self.hold_loads and isinstance(arrival, LoadDone):
            self._held.append(arrival)
        else:
            self._arrivals.append(arrival)

    def _note(self, step: engine_pb2.StepResult) -> None:
        for needed in step.adapters_needed:
            self.asked.append(needed.adapter_version)
            self._deliver(needed.adapter_version)
        for batch in step.tokens:
            for sequence in batch.sequences:
                self.messages.append(sequence)
                name = sequence.key.request_id + (f"/{sequence.output_index}" if sequence.output_index else "")
                self.tokens.setdefault(name, []).extend(sequence.token_ids)
                if sequence.finish_reason:
                    self.ended[name] = sequence
        for progress in step.report.progress:
            self.progress.setdefault(progress.key.request_id, []).append(progress)
        if step.HasField("stats"):
            self.stats.append(step.stats)
        self.residency.extend(step.report.residency)
        self.report = step.report

    def _deliver(self, adapter_version: str) -> None:
        if adapter_version in self.library:
            self.send(adapter_fetched=self.library[adapter_version].fetched())
        else:
            error = to_proto(NotFound("ADAPTER_NOT_FOUND", "no such adapter"))
            self.send(adapter_fetch_failed=engine_pb2.AdapterFetchFailed(adapter_version=adapter_version, error=error))


def new_offer(
    name: str,
    prompt: Sequence[int],
    adapter: str = "",
    *,
    max_tokens: int = 8,
    order_key: int = 1,
    attempt: int = 0,
    gateway: str = "gateway",
    delivered: Sequence[int] = (),
    temperature: float = 0.0,
    seed: int = 0,
    adapter_bytes: int = 0,
    ignore_eos: bool = True,
    min_tokens: int = 0,
    stop_token_ids: Sequence[int] = (),
    output: types_pb2.OutputParams | None = None,
    tenant: str = "default",
    isolation_salt: str = "",
) -> scheduler_pb2.Offer:
    request = types_pb2.RequestSpec(
        key=types_pb2.RequestKey(request_id=name, attempt=attempt, tenant=tenant),
        gateway_id=gateway,
        adapter_version=adapter,
        adapter_bytes=adapter_bytes,
        prompt_token_ids=prompt,
        delivered_token_ids=delivered,
        sampling=types_pb2.SamplingParams(temperature=temperature, seed=seed),
        stopping=types_pb2.StoppingParams(
            max_tokens=max_tokens, min_tokens=min_tokens, ignore_eos=ignore_eos, stop_token_ids=stop_token_ids
        ),
        output=output,
        isolation_salt=isolation_salt,
    )
    return scheduler_pb2.Offer(request=request, order_key=order_key)


def key(name: str, attempt: int = 0) -> types_pb2.RequestKey:
    return types_pb2.RequestKey(request_id=name, attempt=attempt, tenant="default")
