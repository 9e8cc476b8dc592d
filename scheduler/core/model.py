"""The words of the core: requests, workers, and what they say of themselves."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from scheduler.core.costs import StepFacts


class Key(NamedTuple):
    """One attempt at one request."""

    request_id: str
    attempt: int
    tenant: str


class RequestState(Enum):
    """Where an attempt is."""

    # In the scheduler's queue.
    QUEUED = "queued"
    # Offered; the worker has not said yet that it knows it.
    OFFERED = "offered"
    # In the worker's local queue.
    WAITING = "waiting"
    # Holds pages of the worker.
    RUNNING = "running"
    # Gave its pages back and waits in the worker's local queue.
    PREEMPTED = "preempted"


class Ending(Enum):
    """How an attempt leaves a worker."""

    FINISHED = "finished"
    FAILED = "failed"
    # Given back before it was admitted.
    REVOKED = "revoked"


class Tier(Enum):
    """Where a worker has an adapter's bytes."""

    STORE = "store"
    HOST = "host"
    PAGES = "pages"


class Reason(Enum):
    """Why a request went to the worker it was offered to."""

    # Its adapter is in the worker's pages or in use there, or it needs none.
    RESIDENT = "resident"
    HOST_HIT = "host_hit"
    COLD = "cold"
    # Another worker has the adapter but far more work.
    SPILL = "spill"


@dataclass(slots=True)
class Timeline:
    """When an attempt reached what; clock seconds, None for what it did not reach."""

    offered: float | None = None
    admitted: float | None = None
    # Since when it waits for its pages again, and how long it did before.
    preempted: float | None = None
    preempted_seconds: float = 0.0
    preemptions: int = 0

    def reach(self, state: RequestState, now: float) -> None:
        """The attempt is in this state on its worker, as far as the worker has said."""
        if state is RequestState.RUNNING:
            if self.admitted is None:
                self.admitted = now
            if self.preempted is not None:
                self.preempted_seconds += now - self.preempted
                self.preempted = None
        elif state is RequestState.PREEMPTED and self.preempted is None:
            self.preempted = now
            self.preemptions += 1


@dataclass(slots=True, eq=False)
class Request:
    """One attempt: what its gateway asked for, and what the scheduler knows of it since. Times are clock seconds."""

    key: Key
    gateway_id: str
    # Digest of the adapter; empty for the base model.
    adapter: str
    adapter_bytes: int
    prompt_tokens: int
    # Prompt plus `max_tokens` is the most one sequence can hold.
    max_tokens: int
    # Tokens of an earlier attempt; they count as output.
    delivered_tokens: int = 0
    num_outputs: int = 1
    # Its client waits for the whole answer: nobody reads its tokens as they come.
    whole: bool = False
    deadline: float | None = None
    # Higher goes first within its tenant.
    priority: int = 0
    # Target for the first token, counted from its arrival; None when there is none.
    slo_seconds: float | None = None
    # Hashes of the prompt's beginnings, one for each `prefix_chunk_tokens`.
    prefix: tuple[int, ...] = ()
    prefix_chunk_tokens: int = 0
    # What the worker gets; the core never looks inside.
    payload: object = None

    # Place among the arrivals, from the first submission on.
    number: int = 0
    # Place in the order of a worker: given with the first offer, smaller afterwards or the same.
    order_key: int | None = None
    arrived: float = 0.0
    # Worker whose line it waits in; None when it waits in none.
    line_id: str | None = None
    # Tokens one output is expected to have in the end; `max_tokens` when nothing is known.
    expected_tokens: int | None = None
    # Seconds of service it is expected to take, and its place in its tenant's virtual time: see `fair.py`.
    cost: float = 0.0
    virtual_deadline: float = 0.0
    # Later requests that were taken before it by its worker.
    overtaken: int = 0
    # Service its tenant was charged for it.
    charged: float = 0.0
    state: RequestState = RequestState.QUEUED
    worker_id: str = ""
    # Number of the gateway's connection that asked for it last.
    connection: int = 0
    # Number of the Offer command.
    offer_seq: int = 0
    # Tokens of one sequence whose KV the worker has computed; keeps its maximum through a preemption.
    computed_tokens: int = 0
    # Tokens of all its outputs together, those of earlier attempts included.
    generated_tokens: int = 0
    timeline: Timeline = field(default_factory=Timeline)
    aborted: bool = False
    # The gateway's number for why it was aborted.
    abort_cause: int = 0
    # A new request under the same key, which waits until this one is off its worker.
    successor: "Request | None" = None

    @property
    def context_tokens(self) -> int:
        """The most tokens one of its sequences can hold."""
        return self.prompt_tokens + self.max_tokens

    @property
    def cost_tokens(self) -> int:
        """Tokens to compute when every output reaches `max_tokens`."""
        return self.prompt_tokens + self.num_outputs * self.max_tokens

    @property
    def remaining_tokens(self) -> int:
        """The part of `cost_tokens` that is still to be computed."""
        return max(self.cost_tokens - self.computed_tokens, 0)

    @property
    def held_tokens(self) -> int:
        """Tokens one of its sequences holds from its next step on."""
        known = max(self.prompt_tokens + self.delivered_tokens, self.computed_tokens)
        return min(known + 1, self.context_tokens)

    @property
    def tenant(self) -> str:
        return self.key.tenant

    @property
    def output_tokens(self) -> int:
        """Tokens one output has so far, at least."""
        return max(self.delivered_tokens, self.generated_tokens // self.num_outputs)

    @property
    def coming_tokens(self) -> int:
        """Tokens that one of its sequences is expected to add to `held_tokens`."""
        expected = self.max_tokens if self.expected_tokens is None else min(self.expected_tokens, self.max_tokens)
        return max(0, self.prompt_tokens + expected - self.held_tokens)


class Phases(NamedTuple):
    """Seconds an attempt spent on its worker: in the local queue, for its adapter, for the prompt, for the output."""

    queue_seconds: float
    load_seconds: float
    prefill_seconds: float
    decode_seconds: float


@dataclass(frozen=True, slots=True)
class Progress:
    """What a worker says about one attempt."""

    key: Key
    state: RequestState | Ending
    adapter: str = ""
    computed_tokens: int = 0
    # Of all outputs together, those of earlier attempts included.
    generated_tokens: int = 0
    # It ended by itself, not by an abort: its length says something.
    complete: bool = False
    # What it took on the worker, once it has ended.
    phases: Phases | None = None


@dataclass(frozen=True, slots=True)
class Residency:
    """A worker has an adapter in this tier from now on. `sequence` numbers the changes, without gaps."""

    adapter: str
    tier: Tier
    num_pages: int = 0
    sequence: int = 0


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a worker can hold. `page_size` is in tokens."""

    num_pages: int
    page_bytes: int
    page_size: int
    max_sequences: int
    max_step_tokens: int = 0

    def adapter_pages(self, adapter_bytes: int) -> int:
        return -(-adapter_bytes // self.page_bytes)

    def context_pages(self, tokens: int) -> int:
        """Pages of one sequence."""
        return -(-tokens // self.page_size)


@dataclass(frozen=True, slots=True)
class TenantState:
    """What a tenant waits for. `service` is what it has had over its weight and `deficit` what it lacks of its share;
    None when the policy counts none."""

    tenant: str
    weight: float
    queued_requests: int
    queued_seconds: float
    service: float | None
    deficit: float | None


@dataclass(frozen=True, slots=True)
class Identity:
    """What all workers of a fleet must have in common."""

    base_fingerprint: str
    tokenizer_digest: str
    # Name of a size -> its value.
    geometry: Mapping[str, int] = field(default_factory=dict)

    @property
    def max_context_tokens(self) -> int:
        """Prompt plus generated tokens of one sequence at most; 0 when the fleet does not say."""
        return self.geometry.get("max_context_tokens", 0)


@dataclass(frozen=True, slots=True)
class Hello:
    """What a worker says of itself when it registers."""

    worker_id: str
    capacity: Capacity
    identity: Identity
    in_flight: tuple[Progress, ...] = ()
    resident: tuple[Residency, ...] = ()
    # Epoch and number of the last command it applied, of whichever registration.
    scheduler_epoch: int = 0
    applied_seq: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """What changed on a worker. `scheduler_epoch` and `applied_seq` name the last command it applied."""

    scheduler_epoch: int = 0
    applied_seq: int = 0
    progress: tuple[Progress, ...] = ()
    residency: tuple[Residency, ...] = ()
    # Whether it takes nothing new from now on; None when the report does not say.
    draining: bool | None = None
    # What its steps took since the last report.
    costs: StepFacts | None = None
    # Pages of its pool by kind, which must be all of them; None when the report does not say.
    pages: tuple[int, ...] | None = None
    # Its place among the reports of this registration, from 1; 0 when the worker does not count.
    number: int = 0
