"""What the core says: commands for workers, answers for gateways."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from scheduler.core.model import Key, Reason, Request, Tier


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
    order_key: int


@dataclass(frozen=True, slots=True)
class Abort:
    """Ends an attempt on a worker. `cause` is the gateway's number for why; 0 when it gave none."""

    key: Key
    cause: int = 0


@dataclass(frozen=True, slots=True)
class Revoke:
    """Takes back an attempt that is not admitted yet; the worker answers with REVOKED, or with its real state."""

    key: Key


@dataclass(frozen=True, slots=True)
class Reorder:
    """Gives an attempt a smaller place in the worker's order."""

    key: Key
    order_key: int


@dataclass(frozen=True, slots=True)
class Preempt:
    """Takes the pages of a running attempt; it waits again in order."""

    key: Key


@dataclass(frozen=True, slots=True)
class Prefetch:
    """Brings an adapter to the worker's host memory before a request needs it there."""

    tenant: str
    adapter: str
    adapter_bytes: int


@dataclass(frozen=True, slots=True)
class StepBudget:
    """Tokens of one step at most, within what the worker allows itself."""

    tokens: int


Action = Offer | Revoke | Reorder | Preempt | Abort | Prefetch | StepBudget


@dataclass(frozen=True, slots=True)
class Command:
    """For one worker. `seq` is one more than that of the command before it, from 1 in each (epoch, worker)."""

    seq: int
    action: Action


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
    # Some workers were not looked at yet: call again soon.
    incomplete: bool = False
