"""Service that clients have had, divided by their weights: who has had least goes first."""

from collections.abc import Mapping

from scheduler.core.clock import Clock
from scheduler.core.lazy_heap import LazyHeap, Place

# Counters of clients that have nothing here any more are swept out when there are more than these, or twice as many as
# were left the last time.
_SPARE_COUNTERS = 1024


class Ledger:
    """The counters of the Virtual Token Counter (Sheng et al., OSDI 2024), for any unit of service.

    A client whose queue was empty is lifted to the least counter of the clients that have queued requests; when there
    are none, of those that have requests on workers; when nobody has anything, to the counter of the client that left
    last. So idling banks no credit, and a client that comes back while others merely run is lifted as well.

    With a grace of some seconds a client that has left no longer ago keeps its place, as users do in UWFQ (TU Delft,
    2025) between the turns of a session, and so does one that has requests on workers. Unlike there it is behind the
    others by no more than so many seconds of service, however many turns it takes: credit stays bounded.

    Counters never fall: service that was charged and not given is credit against the client's next charges, for as
    long as it has requests here.
    """

    def __init__(self, weights: Mapping[str, float], clock: Clock | None = None, grace_seconds: float = 0.0) -> None:
        """`weights` of clients; 1 for those that are not named. Without a `clock` there is no grace."""
        self._weights = weights
        self._clock = clock
        self._grace_seconds = grace_seconds
        # Client -> when it left, of those that did so within the grace.
        self._left_at: dict[str, float] = {}
        self._counters: dict[str, float] = {}
        self._credit: dict[str, float] = {}
        # Requests of each client that are queued, and that are queued or on a worker.
        self._queued: dict[str, int] = {}
        self._active: dict[str, int] = {}
        self._by_queued: LazyHeap[str] = LazyHeap(lambda client: self._place(client, self._queued))
        self._by_active: LazyHeap[str] = LazyHeap(lambda client: self._place(client, self._active))
        self._left = 0.0
        # Counters there may be before idle ones are swept out.
        self._most_counters = _SPARE_COUNTERS

    def counter(self, client: str) -> float:
        return self._counters.get(client, 0.0)

    def weight(self, client: str) -> float:
        return self._weights.get(client, 1.0)

    def has(self, client: str) -> bool:
        """It has requests that are queued or on a worker."""
        return client in self._active

    def is_queued(self, client: str) -> bool:
        return client in self._queued

    @property
    def num_active(self) -> int:
        """Clients that have requests that are queued or on a worker."""
        return len(self._active)

    @property
    def queued_weight(self) -> float:
        """Weights of the clients that have queued requests. O(clients): for estimates."""
        return sum(self.weight(client) for client in self._queued)

    def deficits(self) -> dict[str, float]:
        """Service that each client with queued requests lacks of its share: of what all who have requests here had,
        divided by their weights. O(clients), on any thread.
        """
        # A copy in one step: other threads see the dictionaries change.
        had = {client: self.counter(client) - self._credit.get(client, 0.0) for client in list(self._active)}
        total_weight = sum(map(self.weight, had))
        level = sum(self.weight(client) * counter for client, counter in had.items()) / (total_weight or 1.0)
        waiting = set(self._queued).intersection(had)
        return {client: max(0.0, level - had[client]) * self.weight(client) for client in waiting}

    def queue(self, client: str) -> None:
        """One more of its requests waits."""
        if client not in self._queued:
            self._lift(client)
        self._queued[client] = self._queued.get(client, 0) + 1
        self._by_queued.push(client)

    def unqueue(self, client: str) -> None:
        """One of its requests waits no more."""
        _count_down(self._queued, client)

    def join(self, client: str) -> None:
        """One more of its requests is queued or on a worker: to be called before `queue`."""
        if client not in self._active and client not in self._queued:
            self._lift(client)
        self._active[client] = self._active.get(client, 0) + 1
        self._by_active.push(client)

    def leave(self, client: str) -> None:
        """One of its requests is neither queued nor on a worker any more."""
        _count_down(self._active, client)
        if client not in self._active:
            self._left = self.counter(client)
            self._credit.pop(client, None)
            if self._clock is not None:
                self._left_at[client] = self._clock.now
            self._sweep()

    def charge(self, client: str, service: float) -> None:
        """It gets `service`, which may be negative: then it gets back what an earlier charge had too much."""
        amount = service / self.weight(client) - self._credit.pop(client, 0.0)
        if amount < 0:
            self._credit[client] = -amount
        else:
            self._counters[client] = self.counter(client) + amount

    def _lift(self, client: str) -> None:
        least = self._by_queued.top()
        if least is None:
            least = self._by_active.top()
        floor = self._left if least is None else self.counter(least)
        if self._keeps_its_place(client):
            floor -= self._grace_seconds / self.weight(client)
        self._counters[client] = max(self.counter(client), floor)

    def _keeps_its_place(self, client: str) -> bool:
        if self._clock is None:
            return False
        left_at = self._left_at.get(client)
        return client in self._active or (left_at is not None and self._clock.now - left_at < self._grace_seconds)

    def _place(self, client: str, members: Mapping[str, int]) -> Place | None:
        return (self.counter(client),) if client in members else None

    def _sweep(self) -> None:
        """Forgets idle clients that a lift would bring back to where they are, or further."""
        if len(self._counters) <= self._most_counters:
            return
        least = self._by_active.top()
        floor = self._left if least is None else self.counter(least)
        if self._clock is not None:
            now = self._clock.now
            self._left_at = {c: at for c, at in self._left_at.items() if now - at < self._grace_seconds}
        kept = self._active.keys() | self._left_at.keys()
        self._counters = {c: value for c, value in self._counters.items() if c in kept or value > floor}
        self._most_counters = 2 * len(self._counters) + _SPARE_COUNTERS


def _count_down(counts: dict[str, int], client: str) -> None:
    counts[client] -= 1
    if not counts[client]:
        del counts[client]
