"""What a policy is: the order of requests in a lane, of lanes in a group, and of groups in a line."""

from collections.abc import Mapping
from typing import Literal, Protocol

from scheduler.core.lazy_heap import Place
from scheduler.core.model import Request

# (group, lane in it).
LaneName = tuple[str, str]
Unit = Literal["", "seconds", "tokens"]


class Policy(Protocol):
    """One object for the fleet. It orders every line and is told of everything that happens to a request.

    Places are compared as tuples, the smaller goes first. A group's and a lane's place may grow at any time; it falls
    only when the head of a lane changes.
    """

    # Lanes are adapters, and those that a worker runs already may go first, within bounds.
    clusters: bool
    # A tenant far below its share of a worker has a request of one above its share preempted.
    preempts: bool
    # What service is counted in; empty when it is not counted.
    unit: Unit
    # `newest_first` may change while requests are queued.
    reversible: bool

    @property
    def newest_first(self) -> bool:
        """Lanes are taken from the end; only when `reversible`."""

    def lane_of(self, request: Request) -> LaneName: ...

    def request_place(self, request: Request) -> Place:
        """In its lane; must not change."""

    def lane_place(self, name: LaneName, head: Request) -> Place:
        """Of a lane in its group."""

    def group_place(self, group: str, head: Request) -> Place:
        """Of a group in its line; `head` is the head of its first lane."""

    def ahead(self, request: Request, other: Request) -> float:
        """Seconds of service that the client of the first is ahead of the client of the second; 0 when not counted."""

    def wait_seconds(self, request: Request, line_seconds: float, own_seconds: float) -> float:
        """Until the newcomer has its turn in a line that holds so much service, and so much of its own tenant."""

    def service(self, tenant: str) -> float | None:
        """What the tenant has had over its weight; None when that is not counted."""

    def deficits(self) -> Mapping[str, float]:
        """Service that each tenant that waits lacks of its share; empty when that is not counted. On any thread."""

    def queued(self, request: Request) -> None:
        """It waits from now on."""

    def unqueued(self, request: Request) -> None:
        """It waits no more: it was offered, or it has ended."""

    def started(self, request: Request) -> None:
        """It is on a worker from now on."""

    def served(self, request: Request) -> None:
        """Its worker has told of more tokens."""

    def ended(self, request: Request, *, returned: bool) -> None:
        """It has left its worker; `returned` when it never ran there and waits again."""

    def round_begins(self, num_queued: int) -> None:
        """Decisions are made; so many requests wait."""

    def round_ends(self, num_offered: int, num_queued: int) -> None:
        """So many requests were offered, and so many still wait."""


class Unmetered:
    """A policy that counts nothing."""

    clusters = False
    preempts = False
    unit: Unit = ""
    reversible = False

    @property
    def newest_first(self) -> bool:
        return False

    def ahead(self, request: Request, other: Request) -> float:
        return 0.0

    def wait_seconds(self, request: Request, line_seconds: float, own_seconds: float) -> float:
        return line_seconds

    def service(self, tenant: str) -> float | None:
        return None

    def deficits(self) -> Mapping[str, float]:
        return {}

    def queued(self, request: Request) -> None:
        pass

    def unqueued(self, request: Request) -> None:
        pass

    def started(self, request: Request) -> None:
        pass

    def served(self, request: Request) -> None:
        pass

    def ended(self, request: Request, *, returned: bool) -> None:
        pass

    def round_begins(self, num_queued: int) -> None:
        pass

    def round_ends(self, num_offered: int, num_queued: int) -> None:
        pass
