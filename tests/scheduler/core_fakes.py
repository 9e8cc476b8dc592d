"""Peers of the core without a wire: a worker with a page pool, and makers of events."""

from dataclasses import dataclass, field
from typing import Any

from scheduler.core.commands import (
    Abort,
    Command,
    Offer,
    Placed,
    Preempt,
    Prefetch,
    Refusal,
    Refused,
    Reorder,
    Revoke,
    StepBudget,
)
from scheduler.core.model import (
    Capacity,
    Ending,
    Hello,
    Identity,
    Key,
    Progress,
    Report,
    Request,
    RequestState,
    Residency,
    Tier,
)
from scheduler.core.pages import peak_pages
from scheduler.core.scheduler import Scheduler
from scheduler.core.settings import Settings

EPOCH = 1000
IDENTITY = Identity("base", "tokenizer", {"num_layers": 2, "max_context_tokens": 4096})


def make_request(
    request_id: str, adapter: str = "", *, prompt: int = 8, max_tokens: int = 8, attempt: int = 0, **fields: Any
) -> Request:
    defaults: dict[str, Any] = {"gateway_id": "g", "adapter_bytes": 100 if adapter else 0, "payload": request_id}
    key = Key(request_id, attempt, "default")
    return Request(key=key, adapter=adapter, prompt_tokens=prompt, max_tokens=max_tokens, **(defaults | fields))


def make_hello(
    worker_id: str = "w0",
    *,
    num_pages: int = 64,
    max_sequences: int = 16,
    in_flight: tuple[Progress, ...] = (),
    resident: tuple[Residency, ...] = (),
    identity: Identity = IDENTITY,
    applied: tuple[int, int] = (0, 0),
) -> Hello:
    capacity = Capacity(num_pages=num_pages, page_bytes=50, page_size=4, max_sequences=max_sequences)
    return Hello(worker_id, capacity, identity, in_flight, resident, *applied)


def make_scheduler(**settings: Any) -> Scheduler:
    """Starts at time 0 with gateway `g` connected, and places at once."""
    scheduler = Scheduler(Settings(**({"recovery_seconds": 0.0} | settings)), EPOCH, 0.0)
    scheduler.gateway_connected("g")
    return scheduler


def key(request_id: str, attempt: int = 0) -> Key:
    return Key(request_id, attempt, "default")


def answers(scheduler: Scheduler, now: float = 0.0) -> list[Placed | Refused]:
    return scheduler.schedule(now).answers.get("g", [])


def refusal(scheduler: Scheduler, now: float = 0.0) -> Refusal:
    """The one answer there is, which must be a refusal."""
    (answer,) = answers(scheduler, now)
    assert isinstance(answer, Refused)
    return answer.refusal


def commands(scheduler: Scheduler, now: float = 0.0, worker_id: str = "w0") -> list[tuple[int, str, Key]]:
    """(number, kind, key) of each command for a worker."""
    return [
        (command.seq, *_describe(command))
        for command in scheduler.schedule(now).commands.get(worker_id, [])
        if not isinstance(command.action, Prefetch | StepBudget)
    ]


def _describe(command: Command) -> tuple[str, Key]:
    action = command.action
    assert not isinstance(action, Prefetch | StepBudget)
    return type(action).__name__.lower(), action.request.key if isinstance(action, Offer) else action.key


def progress(request_id: str, state: RequestState | Ending, computed: int = 0) -> Report:
    return Report(progress=(Progress(key(request_id), state, computed_tokens=computed),))


def with_worker(num_pages: int = 64, max_sequences: int = 16, **settings: Any) -> Scheduler:
    scheduler = make_scheduler(**settings)
    scheduler.register(make_hello(num_pages=num_pages, max_sequences=max_sequences), 0.0)
    return scheduler


@dataclass
class Sequence:
    """One request on a simulated worker."""

    request: Request
    order_key: int
    # Tokens it will generate before it ends by itself.
    length: int
    generated: int = 0
    running: bool = False

    @property
    def tokens(self) -> int:
        return self.request.prompt_tokens + self.generated


@dataclass
class SimulatedWorker:
    """Admits in order of the keys while pages last, adds a token to each sequence a step, preempts the youngest."""

    worker_id: str
    num_pages: int = 64
    page_size: int = 4
    max_sequences: int = 8
    # Fraction of max_tokens that is really generated.
    length_ratio: float = 1.0
    epoch: int = 0
    applied_seq: int = 0
    sequences: dict[Key, Sequence] = field(default_factory=dict)
    inbox: list[tuple[int, Command]] = field(default_factory=list)
    num_reports: int = 0
    revoked: dict[Key, Progress] = field(default_factory=dict)
    loads: list[str] = field(default_factory=list)
    hints: list[Prefetch | StepBudget] = field(default_factory=list)
    preemptions: int = 0
    _progress: list[Progress] = field(default_factory=list)
    _residency: list[Residency] = field(default_factory=list)
    _resident: set[str] = field(default_factory=set)
    _changes: int = 0

    def hello(self) -> Hello:
        """Everything it holds or gave back; what it had not reported yet is in it."""
        self.inbox.clear()
        self.num_reports = 0
        self._progress.clear()
        self._residency.clear()
        in_flight = (*(self._state(sequence) for sequence in self.sequences.values()), *self.revoked.values())
        resident = tuple(Residency(adapter, Tier.PAGES, 2) for adapter in sorted(self._resident))
        return make_hello(
            self.worker_id,
            num_pages=self.num_pages,
            max_sequences=self.max_sequences,
            in_flight=in_flight,
            resident=resident,
            applied=(self.epoch, self.applied_seq),
        )

    def apply_inbox(self) -> None:
        """Applies what has arrived. Fails unless the numbers have no gap."""
        for epoch, command in self.inbox:
            if epoch != self.epoch:
                if epoch < self.epoch:
                    continue
                self.epoch, self.applied_seq = epoch, 0
            if command.seq <= self.applied_seq:
                continue
            assert command.seq == self.applied_seq + 1
            self.applied_seq = command.seq
            self._apply(command)
        self.inbox.clear()

    def _apply(self, command: Command) -> None:
        action = command.action
        match action:
            case Offer():
                self._offer(action)
            case Abort():
                self._abort(action)
            case Revoke():
                sequence = self.sequences.get(action.key)
                if sequence and not sequence.running and not sequence.generated:
                    self._end(sequence, Ending.REVOKED)
            case Reorder():
                if sequence := self.sequences.get(action.key):
                    sequence.order_key = min(sequence.order_key, action.order_key)
            case Preempt():
                if (sequence := self.sequences.get(action.key)) and sequence.running:
                    self._give_back(sequence)
            case Prefetch() | StepBudget():
                self.hints.append(action)

    def step(self) -> list[Key]:
        """Applies commands, admits, generates a token for each running sequence; returns the keys that finished."""
        self.apply_inbox()
        for sequence in self._in_order():
            if not sequence.running and not self._admit(sequence):
                break
        for sequence in reversed(self._in_order()):
            while sequence.running and self._pages_next() > self.num_pages:
                self._preempt()
        finished = []
        for sequence in self._in_order():
            if sequence.running:
                sequence.generated += 1
                if sequence.generated >= sequence.length:
                    finished.append(sequence.request.key)
                    self._end(sequence, Ending.FINISHED)
        return finished

    def revoke(self) -> Key | None:
        """Gives back a sequence that has never run."""
        waiting = [s for s in self._in_order() if not s.running and not s.generated]
        if not waiting:
            return None
        self._end(waiting[-1], Ending.REVOKED)
        return waiting[-1].request.key

    def report(self) -> Report:
        self.num_reports += 1
        report = Report(
            self.epoch,
            self.applied_seq,
            tuple(self._progress),
            tuple(self._residency),
            number=self.num_reports,
        )
        self._progress.clear()
        self._residency.clear()
        return report

    def _offer(self, offer: Offer) -> None:
        request = offer.request
        assert request.key not in self.sequences
        self.revoked.pop(request.key, None)
        length = max(1, round(self.length_ratio * request.max_tokens))
        sequence = Sequence(request, offer.order_key, length)
        self.sequences[request.key] = sequence
        self._progress.append(self._state(sequence))

    def _abort(self, abort: Abort) -> None:
        if sequence := self.sequences.get(abort.key):
            self._end(sequence, Ending.FINISHED)

    def _admit(self, sequence: Sequence) -> bool:
        adapter = sequence.request.adapter
        sequence.running = True
        if self._pages_next() > self.num_pages or self._num_running() > self.max_sequences:
            sequence.running = False
            return False
        if adapter and adapter not in self._resident:
            self._resident.add(adapter)
            self.loads.append(adapter)
            self._changes += 1
            self._residency.append(Residency(adapter, Tier.PAGES, 2, self._changes))
        self._progress.append(self._state(sequence))
        return True

    def _preempt(self) -> None:
        youngest = [sequence for sequence in self._in_order() if sequence.running][-1]
        self._give_back(youngest)

    def _give_back(self, sequence: Sequence) -> None:
        sequence.running = False
        self.preemptions += 1
        self._progress.append(self._state(sequence))

    def _end(self, sequence: Sequence, ending: Ending) -> None:
        del self.sequences[sequence.request.key]
        complete = ending is Ending.FINISHED and sequence.generated >= sequence.length
        request = sequence.request
        progress = Progress(request.key, ending, request.adapter, sequence.tokens, sequence.generated, complete)
        self._progress.append(progress)
        if ending is Ending.REVOKED:
            self.revoked[request.key] = progress

    def _state(self, sequence: Sequence) -> Progress:
        request = sequence.request
        if sequence.running:
            return Progress(request.key, RequestState.RUNNING, request.adapter, sequence.tokens, sequence.generated)
        state = RequestState.PREEMPTED if sequence.generated else RequestState.WAITING
        return Progress(request.key, state, request.adapter, generated_tokens=sequence.generated)

    def _in_order(self) -> list[Sequence]:
        return sorted(self.sequences.values(), key=lambda sequence: sequence.order_key)

    def _num_running(self) -> int:
        return sum(sequence.running for sequence in self.sequences.values())

    def _pages_next(self) -> int:
        """Pages after one more token of each running sequence, its adapters included."""
        running = [sequence for sequence in self.sequences.values() if sequence.running]
        adapters = {sequence.request.adapter for sequence in running} - {""}
        kv = sum(-(-(sequence.tokens + 1) // self.page_size) for sequence in running)
        return kv + 2 * len(adapters)


def simulated_peak(sequences: list[tuple[int, int]], page_size: int) -> int:
    """`peak_pages` by brute force: step by step until all have ended."""
    peak, step = 0, 0
    while alive := [held + step for held, coming in sequences if step <= coming]:
        peak = max(peak, sum(-(-tokens // page_size) for tokens in alive))
        step += 1
    return peak


def estimated_pages(scheduler: Scheduler, worker_id: str) -> int:
    """The peak of what the worker has and nobody told to give its pages back, adapters included, by brute force."""
    worker = scheduler.fleet.get(worker_id)
    assert worker is not None
    away = {*worker.rotated, *worker.displaced}
    present = [request for key, request in worker.requests.items() if key not in away]
    pairs = [(request.held_tokens, request.coming_tokens) for request in present]
    adapters = {request.adapter: worker.room.adapter_pages(request) for request in present}
    peak = simulated_peak(pairs, worker.capacity.page_size)
    assert peak == peak_pages(pairs, worker.capacity.page_size)
    return peak + sum(adapters.values())
