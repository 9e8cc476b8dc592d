"""The words of the core: what comes in as events, and what goes out as commands and answers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple


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
    deadline: float | None = None
    # What the worker gets; the core never looks inside.
    payload: object = None

    order_key: int = 0
    arrived: float = 0.0
    state: RequestState = RequestState.QUEUED
    worker_id: str = ""
    # Number of the gateway's connection that asked for it last.
    connection: int = 0
    # Number of the Offer command.
    offer_seq: int = 0
    # Tokens of one sequence whose KV the worker has computed; keeps its maximum through a preemption.
    computed_tokens: int = 0
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

    def coming_tokens(self, output_estimate_ratio: float) -> int:
        """Tokens that one of its sequences is expected to add to `held_tokens`."""
        return math.ceil(output_estimate_ratio * (self.context_tokens - self.held_tokens))


@dataclass(frozen=True, slots=True)
class Progress:
    """What a worker says about one attempt."""

    key: Key
    state: RequestState | Ending
    adapter: str = ""
    computed_tokens: int = 0


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

    def adapter_pages(self, adapter_bytes: int) -> int:
        return -(-adapter_bytes // self.page_bytes)

    def context_pages(self, tokens: int) -> int:
        """Pages of one sequence."""
        return -(-tokens // self.page_size)


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


@dataclass(frozen=True, slots=True)
class Report:
    """What changed on a worker. `scheduler_epoch` and `applied_seq` name the last command it applied."""

    scheduler_epoch: int = 0
    applied_seq: int = 0
    progress: tuple[Progress, ...] = ()
    residency: tuple[Residency, ...] = ()
    # Whether it takes nothing new from now on; None when the report does not say.
    draining: bool | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request will not run. `code` is the name of a gRPC status code."""

    code: str
    reason: str
    message: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    retry_after_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Offer:
    """Gives a worker a request."""

    request: Request
    # Time left until the client's deadline.
    remaining_seconds: float | None
    reason: Reason
    # Where the adapter is; None for the base model.
    tier: Tier | None
    queued_seconds: float


@dataclass(frozen=True, slots=True)
class Abort:
    """Ends an attempt on a worker. `cause` is the gateway's number for why; 0 when it gave none."""

    key: Key
    cause: int = 0


@dataclass(frozen=True, slots=True)
class Command:
    """For one worker. `seq` is one more than that of the command before it, from 1 in each (epoch, worker)."""

    seq: int
    action: Offer | Abort


@dataclass(frozen=True, slots=True)
class Placed:
    """The attempt was offered to this worker."""

    key: Key
    worker_id: str
    # Where the worker has the adapter; None for the base model, and where it is an earlier offer.
    tier: Tier | None = None


@dataclass(frozen=True, slots=True)
class Refused:
    """The attempt will not run."""

    key: Key
    refusal: Refusal


@dataclass(slots=True)
class Decisions:
    """What one call of `schedule()` says, in order."""

    # Worker id -> commands.
    commands: dict[str, list[Command]] = field(default_factory=dict)
    # Gateway id -> answers.
    answers: dict[str, list[Placed | Refused]] = field(default_factory=dict)
