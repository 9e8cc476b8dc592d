"""The engine: one thread that applies commands, places pages, runs a batch and reports, step after step."""

import time
from collections.abc import Iterable
from dataclasses import dataclass

from common.errors import FailedPrecondition
from common.packing import PackedLayout
from gpu_worker.batching import Batcher, Chunk, StepPlan
from gpu_worker.commands import Arrival, CommandProcessor
from gpu_worker.host_tier import HostTier
from gpu_worker.loader import LoadDone, Loader
from gpu_worker.loan import Loan
from gpu_worker.memory.manager import MemoryManager
from gpu_worker.model_runner import ModelRunner
from gpu_worker.outbox import Outbox
from gpu_worker.prefetch import Prefetcher
from gpu_worker.sequence import Sequence, SequenceState
from gpu_worker.step_books import Flight, StepBooks
from gpu_worker.step_output import StepOutput
from gpu_worker.tier_log import TierLog
from loraplex.v1 import engine_pb2, scheduler_pb2, types_pb2

# The scheduler hears how far the running sequences are once in so many steps: it charges tenants by it.
PROGRESS_STEPS = 16

_NOT_FINITE = "the model's output is not finite: the weights of the adapter or of the base are too large together"


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Bounds of a step and of a sequence."""

    max_step_tokens: int
    max_sequences: int
    max_context_tokens: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]


class Engine:
    """Sequences in, tokens out. Every method runs on the engine's thread.

    With `overlap` the output of a step is handled while the next one runs. That one is planned by counts, which are
    known; a sequence that turns out to have ended has computed one token too many in it, which nobody gets.
    """

    def __init__(
        self,
        runner: ModelRunner,
        memory: MemoryManager,
        loader: Loader,
        host: HostTier,
        limits: EngineLimits,
        loan: Loan,
        *,
        overlap: bool = False,
    ) -> None:
        """`loan` is lent while a step is computed or waited for."""
        self._runner = runner
        self._memory = memory
        self._loader = loader
        self._host = host
        self._loan = loan
        self._overlap = overlap
        self._outbox = Outbox()
        self._batcher = Batcher(
            memory, self._layout, max_step_tokens=limits.max_step_tokens, max_sequences=limits.max_sequences
        )
        self._tiers = TierLog(memory, host)
        self._prefetcher = Prefetcher(self._batcher, memory, host)
        self._commands = CommandProcessor(
            self._batcher,
            memory,
            host,
            self._prefetcher,
            self._tiers,
            self._outbox,
            eos_token_ids=limits.eos_token_ids,
            max_context_tokens=limits.max_context_tokens,
            vocab_size=limits.vocab_size,
        )
        # Number of the last launched step; the one whose output is not handled yet.
        self._step = 0
        self._flight: Flight | None = None
        # The last plan left somebody out who may find pages when nothing is in flight.
        self._short = False
        self._books = StepBooks()
        # The last plan computed, admitted or preempted something; the next may find other pages free.
        self._moved = False

    @property
    def busy(self) -> bool:
        """Another step can make progress without anything arriving."""
        unfinished = self._batcher.num_running + self._batcher.num_waiting > 0
        return self._flight is not None or (self._moved and unfinished)

    def warm_up(self) -> None:
        """Runs a prefill and a decode, so that the first request does not pay for lazy initialisation."""
        key = types_pb2.RequestKey(request_id="warm-up")
        request = types_pb2.RequestSpec(
            key=key,
            prompt_token_ids=[0],
            sampling=types_pb2.SamplingParams(temperature=0.0, seed=0),
            stopping=types_pb2.StoppingParams(max_tokens=2, ignore_eos=True),
        )
        offer = scheduler_pb2.Offer(request=request, order_key=0)
        commands = scheduler_pb2.CommandBatch(commands=[scheduler_pb2.Command(seq=1, offer=offer)])
        self.step([engine_pb2.EngineCommand(scheduler_commands=commands)])
        while self.busy:
            self.step([])
        self._commands.log.restart()

    def finished_loads(self) -> list[LoadDone]:
        """Loads that have ended and that no arrival will tell of: the next `step` takes them as such."""
        return self._loader.take_done()

    def check_integrity(self) -> None:
        """Raises IntegrityError when the books of the pool do not balance; for idle moments."""
        self._memory.check_integrity()

    def step(self, arrivals: Iterable[Arrival]) -> list[engine_pb2.EngineEvent]:
        """Applies what has arrived, launches a batch, and says what changed. Waits for nothing but a batch."""
        with self._loan:
            events = self._commands.apply(arrivals, self._step)
            stats = self._turn()
            return [*events, engine_pb2.EngineEvent(step=self._report(stats))]

    def foresee(self, offers: Iterable[scheduler_pb2.Offer]) -> None:
        """Starts the copies that offers want: on the thread that received them while a step computes, else with a step.

        The offers are applied between steps like everything else: this only spares them the wait until then.
        """
        versions = [offer.request.adapter_version for offer in offers]
        self._loan.borrow(lambda: self._load(self._prefetcher.early(versions)))

    def _turn(self) -> engine_pb2.StepStats | None:
        """Launches a step and handles one: the one before, or the same."""
        self._books.costs = stats = None
        before = self._flight
        if before and self._short:
            stats, before = self._handle(before), None
        self._flight = None
        self._flight = self._launch(in_flight=before is not None)
        if before:
            stats = self._handle(before)
        if self._flight and not self._overlap:
            stats, self._flight = self._handle(self._flight), None
        self._moved |= stats is not None
        return stats

    def _layout(self, adapter_version: str) -> PackedLayout | None:
        """Of an adapter that can be admitted: it is in pages, or in the host tier."""
        resident = self._memory.adapters.get(adapter_version)
        return resident.layout if resident else self._host.layout(adapter_version)

    def _launch(self, *, in_flight: bool) -> Flight | None:
        """Plans a step and starts it; None when there is nothing to run."""
        started = time.perf_counter()
        plan = self._batcher.plan(self._step, in_flight=in_flight)
        self._moved, self._short = bool(plan.chunks or plan.admitted or plan.preempted), plan.short
        self._announce(plan)
        if not plan.chunks:
            return None
        self._step += 1
        planned = time.perf_counter()
        output = self._runner.launch(plan.chunks, self._step)
        for chunk in plan.chunks:
            self._batcher.launch(chunk)
        return Flight(self._step, plan, output, started, planned - started)

    def _handle(self, flight: Flight) -> engine_pb2.StepStats:
        """Waits for a step and hands its tokens out."""
        with self._loan.lend():
            output = flight.output()
        self._memory.complete(flight.number)
        loads, evictions = self._commands.loads, self._memory.evictions
        stats = self._books.stats(flight, output, loads=loads, evictions=evictions)
        if stats.prefill_tokens:
            share = stats.prefill_tokens / (stats.prefill_tokens + stats.decode_tokens)
            self._memory.costs.prefilled(stats.prefill_tokens, output.forward_seconds * share)
        for chunk in flight.plan.chunks:
            self._advance(chunk, output)
        if flight.number % PROGRESS_STEPS == 0:
            for sequence in self._batcher.running:
                self._outbox.changed(sequence)
        self._books.handled(flight, stats, time.perf_counter())
        return stats

    def _announce(self, plan: StepPlan) -> None:
        """Starts the copies the plan asks for and tells the scheduler who was admitted or preempted."""
        now = time.monotonic()
        moves = self._prefetcher.plan()
        for tenant, adapter_version in moves.asks:
            self._outbox.need_adapter(tenant, adapter_version)
        self._load([*plan.loads, *moves.loads])
        for sequence in plan.admitted:
            self._books.admitted(sequence)
            timings = sequence.timings
            timings.admitted = timings.admitted or now
            if sequence.state is SequenceState.RUNNING:
                timings.loaded = timings.loaded or now
        for sequence in [*plan.admitted, *plan.preempted]:
            self._outbox.changed(sequence)

    def _load(self, adapter_versions: list[str]) -> None:
        """Starts copies into pages that are reserved."""
        for adapter_version in adapter_versions:
            adapter = self._memory.adapters.get(adapter_version)
            if adapter is not None:
                self._loader.load(adapter_version, self._host.take(adapter_version), adapter.pages)

    def _advance(self, chunk: Chunk, output: StepOutput) -> None:
        """Books a computed chunk; a sequence that got a token may have ended with it."""
        sequence = chunk.sequence
        if sequence.finished:
            # It ended while the step was in flight.
            return
        self._batcher.complete(chunk)
        sequence.pending_tokens -= chunk.samples
        sequence.prompt_logprobs.extend(output.prompt_logprobs.get(sequence.sequence_id, ()))
        draw = output.draws.get(sequence.sequence_id)
        if draw is None:
            return
        if not draw.finite:
            self._batcher.remove(sequence, self._step)
            self._outbox.fail(sequence, FailedPrecondition("LOGITS_NOT_FINITE", _NOT_FINITE))
            return
        timings = sequence.timings
        timings.first_token = timings.first_token or time.monotonic()
        sequence.output_token_ids.append(draw.token_id)
        self._outbox.token(sequence, draw.logprobs)
        reason = self._finish_reason(sequence, draw.token_id)
        if reason == types_pb2.FINISH_REASON_UNSPECIFIED:
            return
        self._batcher.remove(sequence, self._step)
        if reason == types_pb2.FINISH_REASON_STOP:
            self._outbox.finish(sequence, reason, counted_as="stop", matched_stop_token_id=draw.token_id)
        else:
            self._outbox.finish(sequence, reason, counted_as="length")

    def _finish_reason(self, sequence: Sequence, token: int) -> "types_pb2.FinishReason.ValueType":
        stopping, num_output = sequence.stopping, len(sequence.output_token_ids)
        if token in stopping.stop_token_ids and num_output > stopping.min_tokens:
            return types_pb2.FINISH_REASON_STOP
        if sequence.is_full(num_output):
            return types_pb2.FINISH_REASON_LENGTH
        return types_pb2.FINISH_REASON_UNSPECIFIED

    def _report(self, stats: engine_pb2.StepStats | None) -> engine_pb2.StepResult:
        result = self._outbox.take()
        result.step_number = self._step
        if stats is not None:
            result.stats.CopyFrom(stats)
        report = result.report
        report.scheduler_epoch = self._commands.log.scheduler_epoch
        report.applied_seq = self._commands.log.applied_seq
        report.step_number = self._step
        report.residency.extend(self._tiers.take_changes())
        report.memory.CopyFrom(self._tiers.usage())
        report.waiting_sequences = self._batcher.num_waiting
        report.running_sequences = self._batcher.num_running
        if self._books.costs is not None:
            report.costs.CopyFrom(self._books.costs)
        return result
