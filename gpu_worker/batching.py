"""Who is in the next step: admission in order, growth, preemption, chunks under the token budget. Integers only."""

from bisect import insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from common.packing import PackedLayout
from gpu_worker.headroom import Headroom
from gpu_worker.memory.manager import MemoryManager
from gpu_worker.memory.prefix_cache import PrefixKeys
from gpu_worker.sequence import Sequence, SequenceState
from gpu_worker.sequence_index import SequenceIndex


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `[start, start + length)` of a sequence, computed in one step.

    What it says stays true while the step is in flight, whatever becomes of the sequence.
    """

    sequence: Sequence
    start: int
    length: int
    # It ends with the sequence's last token, so the step yields the next one.
    samples: bool
    # It ends with a token that the step before draws.
    ends_pending: bool
    # Prompt tokens, by place, whose log-probabilities it yields: each is predicted by the token before it.
    described: range
    # Preemptions of the sequence until then: with one more, its pages are others.
    preemptions: int

    @classmethod
    def of(cls, sequence: Sequence, length: int) -> "Chunk":
        """The next tokens of a sequence."""
        start = sequence.launched_tokens
        end, num_tokens = start + length, sequence.num_tokens
        described = range(0)
        if sequence.wants_prompt_logprobs and (first := sequence.described_tokens + 1) > start:
            described = range(first, min(end + 1, len(sequence.prompt_token_ids)))
        ends_pending = bool(sequence.pending_tokens) and end == num_tokens
        return cls(sequence, start, length, end == num_tokens, ends_pending, described, sequence.preemptions)


@dataclass(slots=True)
class StepPlan:
    """What the next step runs, and what changed while it was planned."""

    chunks: list[Chunk] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    # Adapters whose pages were reserved and must now be filled.
    loads: list[str] = field(default_factory=list)
    # Somebody was left out who may find pages once the step in flight has completed.
    short: bool = False


class Batcher:
    """The worker's local queue and its running sequences.

    Admission follows `order_key` exactly: the first waiting sequence whose adapter is at hand gets pages or everybody
    behind it waits too. Who waits for a load takes no place of a step. Preemption takes the largest `order_key`, so the
    oldest always goes on; a preempted sequence comes back only when its whole length fits.
    """

    def __init__(
        self,
        memory: MemoryManager,
        layout_of: Callable[[str], PackedLayout | None],
        *,
        max_step_tokens: int,
        max_sequences: int,
    ) -> None:
        """`layout_of(digest)` is the adapter's layout once its bytes are in the host tier, else None.

        `max_sequences` of a step; as many more may hold pages while their adapters are loaded.
        """
        self._memory = memory
        self._layout_of = layout_of
        self._max_step_tokens = max_step_tokens
        # What the scheduler wants, within `max_step_tokens`.
        self._step_budget = max_step_tokens
        self._max_sequences = max_sequences
        self._headroom = Headroom(memory.geometry.page_size)
        self._sequences = SequenceIndex()
        # sorted by order_key
        self._waiting: list[tuple[int, str]] = []
        self._running: dict[str, Sequence] = {}

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def get(self, sequence_id: str) -> Sequence | None:
        return self._sequences.get(sequence_id)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def running(self) -> list[Sequence]:
        """Admitted sequences, those that wait for their adapter included."""
        return list(self._running.values())

    def limit_step(self, tokens: int) -> None:
        """Tokens of one step at most from now on, within what the worker allows itself."""
        self._step_budget = max(1, min(tokens, self._max_step_tokens))

    def waiting(self) -> Iterator[Sequence]:
        """The local queue, the next to be admitted first."""
        return (self._sequences[sequence_id] for _, sequence_id in self._waiting)

    def outputs(self, attempt_id: str) -> list[Sequence]:
        """Outputs of an attempt that have not ended."""
        return self._sequences.of_attempt(attempt_id)

    def attempts(self, tenant: str, request_id: str) -> list[Sequence]:
        """Outputs of every attempt at a request that have not ended."""
        return self._sequences.of_request(tenant, request_id)

    def users(self, adapter_version: str) -> list[Sequence]:
        """Sequences of an adapter, whether they hold pages or wait."""
        return self._sequences.of_adapter(adapter_version)

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence in line."""
        self._sequences.add(sequence)
        insort(self._waiting, (sequence.order_key, sequence.sequence_id))

    def reorder(self, sequence: Sequence, order_key: int) -> None:
        """Gives a sequence a smaller key; a larger one is ignored, because keys never grow."""
        if order_key >= sequence.order_key:
            return
        waiting = sequence.state is SequenceState.WAITING
        if waiting:
            self._waiting.remove((sequence.order_key, sequence.sequence_id))
        sequence.order_key = order_key
        if waiting:
            insort(self._waiting, (order_key, sequence.sequence_id))

    def remove(self, sequence: Sequence, last_step: int) -> None:
        """Forgets a sequence and frees what it holds; launched step `last_step` may still touch its pages."""
        self._sequences.remove(sequence)
        if sequence.state is SequenceState.WAITING:
            self._waiting.remove((sequence.order_key, sequence.sequence_id))
        else:
            self._release(sequence, last_step)
            self._headroom.ended(sequence)
        sequence.state = SequenceState.FINISHED

    def preempt(self, sequence: Sequence, last_step: int) -> None:
        """Takes the pages of an admitted sequence and puts it back in line with its tokens kept.

        Its full pages stay in the prefix cache as long as nobody needs them.
        """
        self._release(sequence, last_step, returning=True)
        sequence.state = SequenceState.WAITING
        sequence.computed_tokens = sequence.launched_tokens = 0
        sequence.preemptions += 1
        insort(self._waiting, (sequence.order_key, sequence.sequence_id))

    def launch(self, chunk: Chunk) -> None:
        """The chunk is in a launched step: the next one goes on behind it."""
        sequence = chunk.sequence
        sequence.launched_tokens = chunk.start + chunk.length
        sequence.described_tokens += len(chunk.described)
        sequence.pending_tokens += chunk.samples

    def complete(self, chunk: Chunk) -> None:
        """The chunk is computed; pages that it filled can be shared."""
        sequence, page_size = chunk.sequence, self._memory.geometry.page_size
        if sequence.finished or sequence.preemptions != chunk.preemptions:
            return
        sequence.computed_tokens = chunk.start + chunk.length
        if sequence.computed_tokens // page_size > chunk.start // page_size:
            self._memory.publish(sequence.sequence_id, self._keys(sequence, sequence.computed_tokens))

    def adapter_loaded(self, adapter_version: str) -> list[Sequence]:
        """The adapter is in pages: its admitted sequences join the next step."""
        joined = [sequence for sequence in self.users(adapter_version) if sequence.sequence_id in self._running]
        for sequence in joined:
            sequence.state = SequenceState.RUNNING
        return joined

    def plan(self, last_step: int, *, in_flight: bool = False) -> StepPlan:
        """Decides the next step. `last_step` is the number of the last launched step; `in_flight`: it still runs.

        While it runs nobody is preempted: pages that it gives back may suffice.
        """
        plan = StepPlan()
        self._admit(plan)
        runnable = [sequence for sequence in self._running.values() if _goes_on(sequence)]
        runnable.sort(key=lambda sequence: sequence.order_key)
        oldest, rest = runnable[: self._max_sequences], runnable[self._max_sequences :]
        decodes = [sequence for sequence in oldest if sequence.num_tokens - sequence.launched_tokens == 1]
        prefills = [sequence for sequence in oldest if sequence.num_tokens - sequence.launched_tokens > 1]
        budget = self._step_budget
        for sequence in [*decodes, *prefills, *rest]:
            if budget == 0 or len(plan.chunks) == self._max_sequences:
                break
            length = min(budget, sequence.num_tokens - sequence.launched_tokens)
            if self._grow(sequence, sequence.launched_tokens + length, plan, last_step, in_flight):
                plan.chunks.append(Chunk.of(sequence, length))
                budget -= length
        preempted = {sequence.sequence_id for sequence in plan.preempted}
        plan.chunks = [chunk for chunk in plan.chunks if chunk.sequence.sequence_id not in preempted]
        return plan

    def _admit(self, plan: StepPlan) -> None:
        position, places = 0, self._max_sequences
        loading = sum(sequence.state is SequenceState.LOADING for sequence in self._running.values())
        while position < len(self._waiting) and len(self._running) < min(places + loading, 2 * places):
            sequence = self._sequences[self._waiting[position][1]]
            layout = self._layout_of(sequence.adapter_version) if sequence.adapter_version else None
            source = sequence.outputs[0] if sequence.output_index else None
            shares = source is not None and not source.finished
            if (sequence.adapter_version and layout is None) or (shares and not _prompt_computed(source)):
                position += 1
                continue
            # The last token is computed in any case: its logits are wanted. So are those of a prompt to be described.
            keys = [] if sequence.wants_prompt_logprobs else self._keys(sequence, sequence.num_tokens - 1)
            cached = self._memory.cached_tokens(keys)
            # A resumed sequence would only be preempted again if it came back with less than its whole length.
            most = sequence.num_tokens if sequence.preemptions else cached + self._max_step_tokens
            tokens = min(sequence.num_tokens, most)
            resident = self._memory.adapters.get(sequence.adapter_version) if layout else None
            if not self._has_headroom(sequence, layout):
                return
            if not self._memory.admit(sequence.sequence_id, tokens, sequence.adapter_version, layout, keys):
                return
            sequence.computed_tokens = sequence.launched_tokens = cached
            if not sequence.preemptions:
                sequence.cached_tokens = min(cached, len(sequence.prompt_token_ids))
            if layout and resident is None:
                plan.loads.append(sequence.adapter_version)
            ready = layout is None or (resident is not None and not resident.loading)
            sequence.state = SequenceState.RUNNING if ready else SequenceState.LOADING
            loading += not ready
            del self._waiting[position]
            self._running[sequence.sequence_id] = sequence
            plan.admitted.append(sequence)

    def _has_headroom(self, sequence: Sequence, layout: PackedLayout | None) -> bool:
        """Those who run are not expected to need the pages that the newcomer would take."""
        if not self._running:
            return True
        memory = self._memory
        adapter = memory.adapters.get(sequence.adapter_version)
        yields = adapter is None or adapter.evictable
        taken = memory.geometry.pages_for_bytes(layout.total_bytes) if layout and yields else 0
        counts = memory.counts()
        num_pages = counts.kv + counts.free + counts.quarantined + memory.evictable_pages - taken
        return self._headroom.suffices([sequence, *self._running.values()], num_pages)

    def _grow(self, sequence: Sequence, num_tokens: int, plan: StepPlan, last_step: int, in_flight: bool) -> bool:
        """Makes room for `num_tokens`, preempting from the largest order_key down to this sequence if it must."""
        if sequence.state is not SequenceState.RUNNING:
            return False
        while not self._memory.grow(sequence.sequence_id, num_tokens):
            if in_flight:
                plan.short = True
                return False
            victim = max(self._running.values(), key=lambda running: (running.order_key, running.output_index))
            self.preempt(victim, last_step)
            self._headroom.preempted()
            plan.preempted.append(victim)
            if victim is sequence:
                return False
        return True

    def _release(self, sequence: Sequence, last_step: int, *, returning: bool = False) -> None:
        del self._running[sequence.sequence_id]
        self._memory.release(sequence.sequence_id, sequence.adapter_version, last_step, returning=returning)

    def _keys(self, sequence: Sequence, num_tokens: int) -> list[bytes]:
        """Prefix keys of the full pages among the first `num_tokens`, which are known."""
        page_size = self._memory.geometry.page_size
        if sequence.prefix_keys is None:
            sequence.prefix_keys = PrefixKeys(sequence.adapter_version, sequence.isolation_salt, page_size)
        keys, num_pages = sequence.prefix_keys.keys, num_tokens // page_size
        if len(keys) < num_pages:
            sequence.prefix_keys.extend(sequence.token_ids(len(keys) * page_size, num_pages * page_size))
        return keys[:num_pages]


def _prompt_computed(source: Sequence | None) -> bool:
    """Output 0 has the prompt in pages, so the others can share them."""
    return source is not None and source.computed_tokens >= len(source.prompt_token_ids)


def _goes_on(sequence: Sequence) -> bool:
    """It may be in the next step: the token that a step in flight draws is not its last one."""
    ends = bool(sequence.pending_tokens) and sequence.is_full(sequence.num_output_tokens)
    return sequence.state is SequenceState.RUNNING and not ends
