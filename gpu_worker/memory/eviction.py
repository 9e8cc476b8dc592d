"""Who yields pages next: one line for cold adapters and unreferenced prefix pages together.

    in use --add--> cooling --complete(step)--> evictable --pop--> gone
      ^                |                           |
      +----discard-----+---------------------------+

A candidate is worth (recent demand x seconds to bring it back) / pages. `GreedyDual` turns worth into a place in a heap
that needs no second look: N. Young, "The k-server dual and loose competitiveness for paging" (1994), with frequency and
size as in L. Cherkasova, "Improving WWW proxies performance with Greedy-Dual-Size-Frequency caching" (1998).
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto
from heapq import heapify, heappop, heappush
from typing import Protocol

from gpu_worker.memory.allocator import IntegrityError

# Demand halves while this many requests are admitted: long enough to see that an adapter of a few per mille is wanted.
HALF_LIFE_REQUESTS = 1024
# Void heap entries that are not worth a sweep.
_FEW_ENTRIES = 64


class EvictionPolicy(Protocol):
    """Places candidates in line; the smallest rank goes first."""

    def rank(self, worth: float) -> float:
        """The place of a candidate of which somebody let go just now."""

    def raised(self, rank: float, worth: float) -> float:
        """The place of a candidate in line that turns out to be worth so much more."""

    def evicted(self, rank: float) -> None:
        """The candidate of this rank, the smallest, was evicted."""


class GreedyDual:
    """Rank = worth + the rank evicted last: a candidate that nobody wants falls behind all that are newer."""

    def __init__(self) -> None:
        self._floor = 0.0

    def rank(self, worth: float) -> float:
        return self._floor + worth

    def raised(self, rank: float, worth: float) -> float:
        return rank + worth

    def evicted(self, rank: float) -> None:
        self._floor = rank


class LeastRecentlyUsed:
    """The baseline: whatever was let go of first goes first, at any cost."""

    def __init__(self) -> None:
        self._releases = 0

    def rank(self, worth: float) -> float:
        self._releases += 1
        return self._releases

    def raised(self, rank: float, worth: float) -> float:
        return rank

    def evicted(self, rank: float) -> None:
        """The order of release is all that counts."""


class _State(Enum):
    IN_USE = auto()
    COOLING = auto()
    EVICTABLE = auto()


@dataclass(slots=True, eq=False, kw_only=True)
class Candidate(ABC):
    """Something whose pages may be taken while nobody uses it."""

    # The last launched step that may touch its pages.
    last_step: int = 0
    # Requests that wanted it, older ones counting less, as of `demand_at` on the queue's clock.
    demand: float = 0.0
    demand_at: int = 0
    rank: float = 0.0
    # Of its one valid heap entry; 0 = none.
    ticket: int = 0
    state: _State = _State.IN_USE

    @property
    @abstractmethod
    def num_pages(self) -> int:
        """Pages that an eviction gives."""

    @property
    def expected_demand(self) -> float:
        """What its demand so far lets expect, compared with other candidates."""
        return self.demand

    @property
    def exposed(self) -> bool:
        """Nothing that is kept depends on it."""
        return True

    @property
    def evictable(self) -> bool:
        return self.state is _State.EVICTABLE


class EvictionQueue:
    """Candidates that nobody uses, in the order of a policy. O(log n) for each call; `complete` by what cools."""

    def __init__(self, policy: EvictionPolicy) -> None:
        self._policy = policy
        # (rank, ticket, candidate); an entry whose ticket is not the candidate's is void
        self._heap: list[tuple[float, int, Candidate]] = []
        self._tickets = 0
        self._valid = 0
        # last step -> candidates that wait for it
        self._cooling: dict[int, list[Candidate]] = {}
        self._completed_step = 0
        # requests admitted
        self._clock = 0
        # Pages that `pop` can give, one after the other.
        self.evictable_pages = 0

    def tick(self) -> None:
        """A request was admitted: what was wanted before counts a little less."""
        self._clock += 1

    def wanted(self, candidate: Candidate) -> None:
        """A request needs the candidate."""
        age = self._clock - candidate.demand_at
        candidate.demand = candidate.demand * 0.5 ** (age / HALF_LIFE_REQUESTS) + 1.0
        candidate.demand_at = self._clock

    def add(self, candidate: Candidate, seconds: float) -> None:
        """Nobody uses the candidate, which takes `seconds` to bring back; evictable once its last step is over."""
        candidate.rank = self._policy.rank(candidate.expected_demand * seconds / candidate.num_pages)
        if candidate.last_step <= self._completed_step:
            self._make_evictable(candidate)
            return
        candidate.state = _State.COOLING
        self._cooling.setdefault(candidate.last_step, []).append(candidate)

    def discard(self, candidate: Candidate) -> None:
        """Somebody uses the candidate again, or it is gone."""
        if candidate.state is _State.EVICTABLE:
            self.evictable_pages -= candidate.num_pages
        self._void(candidate)
        candidate.state = _State.IN_USE

    def restore(self, candidate: Candidate) -> None:
        """The candidate was discarded for a moment only: it gets its place back."""
        self._make_evictable(candidate)

    def defer(self, candidate: Candidate, seconds: float) -> None:
        """Puts the candidate popped last back in line: to bring it back would take `seconds` more."""
        worth = candidate.expected_demand * seconds / candidate.num_pages
        candidate.rank = self._policy.raised(candidate.rank, worth)
        self._make_evictable(candidate)

    def expose(self, candidate: Candidate) -> None:
        """The last thing that depended on the candidate is gone."""
        if candidate.evictable:
            self._push(candidate)

    def complete(self, step: int) -> None:
        """Step `step` and all before it have completed."""
        self._completed_step = step
        for last_step in [last_step for last_step in self._cooling if last_step <= step]:
            for candidate in self._cooling.pop(last_step):
                if candidate.state is _State.COOLING and candidate.last_step == last_step:
                    self._make_evictable(candidate)

    def pop(self) -> Candidate:
        """Takes the next one out of the line. Raises IndexError when `evictable_pages` is 0."""
        while True:
            rank, ticket, candidate = heappop(self._heap)
            if candidate.ticket == ticket:
                self._policy.evicted(rank)
                self.discard(candidate)
                return candidate

    def check_integrity(self, candidates: Iterable[Candidate]) -> None:
        """Raises IntegrityError unless the line and its sum are what `candidates`, all there are, make them."""
        entries = Counter(id(candidate) for _, ticket, candidate in self._heap if candidate.ticket == ticket)
        pages = 0
        for candidate in candidates:
            if entries.pop(id(candidate), 0) != (candidate.evictable and candidate.exposed):
                raise IntegrityError(f"{candidate!r} is in the wrong line")
            pages += candidate.num_pages if candidate.evictable else 0
        if entries or pages != self.evictable_pages:
            raise IntegrityError(
                f"{pages} pages are evictable, booked: {self.evictable_pages}; {len(entries)} are gone"
            )

    def _make_evictable(self, candidate: Candidate) -> None:
        candidate.state = _State.EVICTABLE
        self.evictable_pages += candidate.num_pages
        if candidate.exposed:
            self._push(candidate)

    def _push(self, candidate: Candidate) -> None:
        self._tickets += 1
        self._valid += 1
        candidate.ticket = self._tickets
        heappush(self._heap, (candidate.rank, candidate.ticket, candidate))
        if len(self._heap) > 2 * self._valid + _FEW_ENTRIES:
            self._heap = [entry for entry in self._heap if entry[2].ticket == entry[1]]
            heapify(self._heap)

    def _void(self, candidate: Candidate) -> None:
        if candidate.ticket:
            candidate.ticket = 0
            self._valid -= 1
