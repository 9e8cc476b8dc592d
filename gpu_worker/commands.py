"""Applies what arrived between two steps: commands of the scheduler and of gateways, finished loads."""

import logging
import time
from collections.abc import Iterable, Iterator

from common.errors import DataLoss, LoraplexError, from_proto
from gpu_worker.batching import Batcher
from gpu_worker.convert import attempt_id, to_progress, to_sequences
from gpu_worker.host_tier import HostTier
from gpu_worker.loader import LoadDone
from gpu_worker.memory.manager import MemoryManager
from gpu_worker.memory_calls import MemoryCalls
from gpu_worker.outbox import Outbox
from gpu_worker.prefetch import Prefetcher
from gpu_worker.request_limits import RequestLimits
from gpu_worker.sequence import Sequence, SequenceState
from gpu_worker.tier_log import TierLog
from loraplex.v1 import engine_pb2, scheduler_pb2, types_pb2

_log = logging.getLogger(__name__)

Arrival = engine_pb2.EngineCommand | LoadDone

# How an output that a gateway ended is counted.
_COUNTED_AS = {
    scheduler_pb2.ABORT_CAUSE_DEADLINE: "deadline",
    scheduler_pb2.ABORT_CAUSE_STOP: "stop",
    scheduler_pb2.ABORT_CAUSE_SLOW_READER: "slow_reader",
}

MAX_REVOKED = 256


class CommandLog:
    """Each (scheduler_epoch, seq) is applied in order and exactly once."""

    def __init__(self) -> None:
        self.scheduler_epoch = 0
        self.applied_seq = 0

    def accept(self, batch: scheduler_pb2.CommandBatch) -> Iterator[scheduler_pb2.Command]:
        """The commands of `batch` that are due; those of an older epoch or already applied are void."""
        if batch.scheduler_epoch < self.scheduler_epoch:
            return
        if batch.scheduler_epoch > self.scheduler_epoch:
            self.scheduler_epoch, self.applied_seq = batch.scheduler_epoch, 0
        for command in batch.commands:
            if command.seq <= self.applied_seq:
                continue
            if command.seq != self.applied_seq + 1:
                _log.error("command %d follows %d: the rest of the batch is void", command.seq, self.applied_seq)
                return
            self.applied_seq = command.seq
            yield command

    def restart(self) -> None:
        """The face registers anew: commands count from 1 again."""
        self.applied_seq = 0


class CommandProcessor:
    """Changes the batcher, the host tier and the memory manager; tells the outbox."""

    def __init__(
        self,
        batcher: Batcher,
        memory: MemoryManager,
        host: HostTier,
        prefetcher: Prefetcher,
        tiers: TierLog,
        outbox: Outbox,
        *,
        eos_token_ids: tuple[int, ...],
        max_context_tokens: int,
        vocab_size: int,
    ) -> None:
        self.log = CommandLog()
        self.loads = 0
        self._batcher = batcher
        self._memory = memory
        self._host = host
        self._prefetcher = prefetcher
        self._tiers = tiers
        self._outbox = outbox
        self._eos_token_ids = eos_token_ids
        self._limits = RequestLimits(memory, max_context_tokens=max_context_tokens, vocab_size=vocab_size)
        self._memory_calls = MemoryCalls(batcher, memory, host, prefetcher, tiers, self._limits)
        # Attempts given back lately: the report of it may get lost with a stream.
        self._revoked: dict[str, scheduler_pb2.RequestProgress] = {}

    def apply(self, arrivals: Iterable[Arrival], last_step: int) -> list[engine_pb2.EngineEvent]:
        """Applies `arrivals` in order and returns the answers that cannot wait for the step's report.

        `last_step` is the number of the last launched step.
        """
        self._last_step = last_step
        events: list[engine_pb2.EngineEvent] = []
        for arrival in arrivals:
            if isinstance(arrival, LoadDone):
                self._load_done(arrival)
                continue
            kind = arrival.WhichOneof("command")
            if kind == "scheduler_commands":
                for command in self.log.accept(arrival.scheduler_commands):
                    self._apply_command(command)
            elif kind == "abort":
                self._abort(arrival.abort)
            elif kind == "adapter_fetched":
                self._adapter_fetched(arrival.adapter_fetched)
            elif kind == "adapter_fetch_failed":
                self._fetch_failed(arrival.adapter_fetch_failed)
            elif kind == "gateway_lost":
                for sequence in [s for s in self._batcher if s.gateway_id == arrival.gateway_lost.gateway_id]:
                    self._end_aborted(sequence, scheduler_pb2.ABORT_CAUSE_CANCELLED)
            elif kind == "memory":
                events.append(engine_pb2.EngineEvent(memory=self._memory_calls.reply(arrival.memory)))
            elif kind == "take_snapshot":
                events.append(engine_pb2.EngineEvent(snapshot=self._snapshot()))
                self.log.restart()
        return events

    def _apply_command(self, command: scheduler_pb2.Command) -> None:
        kind = command.WhichOneof("command")
        if kind == "offer":
            self._offer(command.offer)
        elif kind == "prefetch":
            self._prefetcher.hint(command.prefetch.tenant, command.prefetch.adapter_version)
        elif kind == "abort":
            self._abort(command.abort)
        elif kind == "revoke":
            self._revoke(command.revoke.key)
        elif kind == "reorder":
            for sequence in self._outputs(command.reorder.key):
                self._batcher.reorder(sequence, command.reorder.order_key)
        elif kind == "step_budget":
            self._batcher.limit_step(command.step_budget.tokens)
        elif kind == "preempt":
            for sequence in self._outputs(command.preempt.key):
                if sequence.state is not SequenceState.WAITING:
                    self._batcher.preempt(sequence, self._last_step)
                    self._outbox.changed(sequence)

    def _outputs(self, key: types_pb2.RequestKey) -> list[Sequence]:
        return self._batcher.outputs(attempt_id(key))

    def _offer(self, offer: scheduler_pb2.Offer) -> None:
        if self._outputs(offer.request.key):
            return
        self._revoked.pop(attempt_id(offer.request.key), None)
        outputs = to_sequences(offer, self._eos_token_ids, self._limits.max_context_tokens)
        first = outputs[0]
        first.timings.offered = time.monotonic()
        # A newer attempt fences the older ones, in whatever order they come.
        for other in self._batcher.attempts(first.tenant, first.request_id):
            if other.attempt > first.attempt:
                self._end_unstarted(outputs)
                return
            self._end_aborted(other, scheduler_pb2.ABORT_CAUSE_CANCELLED)
        resident = self._memory.adapters.get(first.adapter_version)
        layout = resident.layout if resident else self._host.layout(first.adapter_version)
        adapter_bytes = layout.total_bytes if layout else offer.request.adapter_bytes
        if error := self._limits.unusable_tokens(first) or self._limits.never_fits(first, adapter_bytes):
            self._outbox.fail(first, error)
            return
        for sequence in outputs:
            self._batcher.add(sequence)
        self._outbox.changed(first)

    def _end_unstarted(self, outputs: list[Sequence]) -> None:
        for sequence in outputs:
            sequence.state = SequenceState.FINISHED
            self._outbox.finish(sequence, types_pb2.FINISH_REASON_ABORTED, counted_as="cancelled")

    def _abort(self, abort: scheduler_pb2.Abort) -> None:
        for sequence in self._outputs(abort.key):
            if not abort.output_indexes or sequence.output_index in abort.output_indexes:
                self._end_aborted(sequence, abort.cause)

    def _end_aborted(self, sequence: Sequence, cause: "scheduler_pb2.AbortCause.ValueType") -> None:
        self._batcher.remove(sequence, self._last_step)
        # A stop string matched at the gateway: the output is complete.
        stopped = cause == scheduler_pb2.ABORT_CAUSE_STOP
        reason = types_pb2.FINISH_REASON_STOP if stopped else types_pb2.FINISH_REASON_ABORTED
        self._outbox.finish(sequence, reason, counted_as=_COUNTED_AS.get(cause, "cancelled"))

    def _revoke(self, key: types_pb2.RequestKey) -> None:
        """Gives a request back unless it has held pages already; then its real state answers."""
        outputs = self._outputs(key)
        if not outputs:
            return
        if all(sequence.state is SequenceState.WAITING and not sequence.preemptions for sequence in outputs):
            for sequence in outputs:
                self._batcher.remove(sequence, self._last_step)
            self._outbox.revoked(outputs[0])
            progress = to_progress(outputs[0])
            progress.state = scheduler_pb2.REQUEST_STATE_REVOKED
            self._revoked[attempt_id(key)] = progress
            if len(self._revoked) > MAX_REVOKED:
                del self._revoked[next(iter(self._revoked))]
        else:
            self._outbox.changed(outputs[0])

    def _fetch_failed(self, failed: engine_pb2.AdapterFetchFailed) -> None:
        self._host.drop(failed.adapter_version)
        self._prefetcher.forget(failed.adapter_version)
        self._fail_adapter(failed.adapter_version, from_proto(failed.error))

    def _adapter_fetched(self, fetched: engine_pb2.AdapterFetched) -> None:
        error = self._host.add(fetched)
        self._outbox.settled(fetched.adapter_version)
        if error is not None:
            self._prefetcher.forget(fetched.adapter_version)
            if isinstance(error, DataLoss):
                self._outbox.distrusted(fetched.adapter_version, fetched.layout.sha256)
            self._fail_adapter(fetched.adapter_version, error)
            return
        # Their offers may have promised a smaller adapter than came; waiting for pages would be for ever.
        for sequence in self._batcher.users(fetched.adapter_version):
            if error := self._limits.never_fits(sequence, fetched.layout.total_bytes):
                self._batcher.remove(sequence, self._last_step)
                self._outbox.fail(sequence, error)

    def _fail_adapter(self, adapter_version: str, error: LoraplexError) -> None:
        for sequence in self._batcher.users(adapter_version):
            self._batcher.remove(sequence, self._last_step)
            self._outbox.fail(sequence, error)

    def _load_done(self, done: LoadDone) -> None:
        self._host.give_back(done.adapter_version)
        if done.failure:
            self._outbox.distrusted(done.adapter_version, self._host.drop(done.adapter_version))
            error = DataLoss("ADAPTER_CORRUPT", f"the adapter cannot be loaded: {done.failure}")
            self._fail_adapter(done.adapter_version, error)
            self._memory.drop_failed(done.adapter_version)
            return
        self._memory.finish_loading(done.adapter_version, done.seconds)
        self.loads += 1
        if (adapter := self._memory.adapters.get(done.adapter_version)) is not None:
            self._outbox.loaded(adapter, done.seconds)
        for sequence in self._batcher.adapter_loaded(done.adapter_version):
            sequence.timings.loaded = sequence.timings.loaded or time.monotonic()

    def _snapshot(self) -> engine_pb2.EngineSnapshot:
        return engine_pb2.EngineSnapshot(
            in_flight=[*{s.attempt_id: to_progress(s) for s in self._batcher}.values(), *self._revoked.values()],
            scheduler_epoch=self.log.scheduler_epoch,
            applied_seq=self.log.applied_seq,
            resident=self._tiers.snapshot(),
            memory=self._tiers.usage(),
        )
