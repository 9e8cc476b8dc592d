"""Who yields pages next: one line for cold adapters and unreferenced prefix pages together.

    in use --add--> cooling --complete(step)--> evictable --pop--> gone
      ^                |                           |
      +----discard-----+---------------------------+

The one whose return would cost least, weighed by how likely it is wanted, goes first. What makes a candidate worth more
is noticed when its turn comes, what makes it worth less is told by `look_again`: so a heap is enough.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto
from heapq import heapify, heappop, heappush
from typing import Protocol

from gpu_worker.memory.allocator import IntegrityError

# Void heap entries that are not worth a sweep.
_FEW_ENTRIES = 64


class EvictionPolicy(Protocol):
    """Places candidates in line."""

    def rank(self, candidate: "Candidate") -> float:
        """Its place as of now; the smallest goes first."""


class LeastWorth:
    """Whose pages save the fewest seconds goes first."""

    def rank(self, candidate: "Candidate") -> float:
        return candidate.worth


class LeastRecentlyUsed:
    """The baseline: whatever was let go of first goes first, at any cost."""

    def rank(self, candidate: "Candidate") -> float:
        return candidate.release


class _State(Enum):
    IN_USE = auto()
    COOLING = auto()
    EVICTABLE = auto()


@dataclass(slots=True, eq=False, kw_only=True)
class Candidate(ABC):
    """Something whose pages may be taken while nobody uses it."""

    # The last launched step that may touch its pages.
    last_step: int = 0
    # Number of the release that put it in line.
    release: int = 0
    rank: float = 0.0
    # Of its one valid heap entry; 0 = none.
    ticket: int = 0
    state: _State = _State.IN_USE

    @property
    @abstractmethod
    def num_pages(self) -> int:
        """Pages that an eviction gives."""

    @property
    @abstractmethod
    def worth(self) -> float:
        """The logarithm of what a page of it saves: chance that a request wants it x seconds to bring it back.

        On a scale where demand that is not renewed stands still.
        """

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
        self._releases = 0
        # Pages that `pop` can give, one after the other.
        self.evictable_pages = 0

    def add(self, candidate: Candidate) -> None:
        """Nobody uses the candidate; evictable once its last step is over."""
        self._releases += 1
        candidate.release = self._releases
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

    def look_again(self, candidate: Candidate) -> None:
        """The candidate may be worth less than before."""
        if candidate.evictable and candidate.exposed:
            self._void(candidate)
            self._push(candidate)

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
            if candidate.ticket != ticket:
                continue
            if self._policy.rank(candidate) > rank:
                self.look_again(candidate)
                continue
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
        candidate.rank = self._policy.rank(candidate)
        heappush(self._heap, (candidate.rank, candidate.ticket, candidate))
        if len(self._heap) > 2 * self._valid + _FEW_ENTRIES:
            self._heap = [entry for entry in self._heap if entry[2].ticket == entry[1]]
            heapify(self._heap)

    def _void(self, candidate: Candidate) -> None:
        if candidate.ticket:
            candidate.ticket = 0
            self._valid -= 1
