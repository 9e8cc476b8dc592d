"""One round of decisions: workers that something happened to are given what they can take, idle ones help out."""

from scheduler.core.commands import Prefetch
from scheduler.core.fleet import Fleet
from scheduler.core.lifecycle import Lifecycle
from scheduler.core.lines import Line
from scheduler.core.model import Request
from scheduler.core.rotation import rotate
from scheduler.core.selection import Selection
from scheduler.core.settings import Settings
from scheduler.core.shares import make_room, may_be_below_share
from scheduler.core.worker import Worker

# Workers and heads looked at after which a round ends and the next follows: it stays short whatever has happened.
_LOOKS_OF_A_ROUND = 32
# Busiest workers whose lines one looks at that has work but nothing in line.
_DONORS = 4


class Rounds:
    """Goes through the workers that were touched, in the order of what happened to them."""

    def __init__(self, fleet: Fleet, life: Lifecycle, settings: Settings) -> None:
        self._fleet = fleet
        self._life = life
        self._backlog = life.queue
        self._placement = life.placement
        self._policy = life.policy
        self._settings = settings
        self._selection = Selection(life.policy, settings)
        self._num_offered = 0

    def run(self, now: float) -> bool:
        """Offers what can be offered; False when there is more to look at."""
        self._policy.round_begins(self._backlog.num_requests)
        self._num_offered = 0
        last_look = self._selection.num_looks + _LOOKS_OF_A_ROUND
        for worker in self._fleet.workers:
            if worker.wake_at is not None and worker.wake_at <= now:
                self._life.touch(worker.worker_id)
        touched = self._life.touched
        looked_at = []
        while touched and self._selection.num_looks < last_look:
            worker_id = next(iter(touched))
            del touched[worker_id]
            found = self._fleet.get(worker_id)
            if found is not None and not found.draining:
                self._serve(found, now)
                looked_at.append(found)
        helped = self._help(looked_at, now)
        self._policy.round_ends(self._num_offered, self._backlog.num_requests)
        return not touched and not helped

    def _serve(self, worker: Worker, now: float) -> None:
        """Gives the worker what it can take of its line."""
        worker.wake_at = None
        self._selection.num_looks += 1
        line = worker.line
        if line.num_requests:
            for request in self._selection.choose(worker, line, now):
                self._give(request, worker, now)
        if worker.rotated or worker.room.may_be_crowded(worker.line.largest_adapter_bytes):
            head = line.head()
            order_key = rotate(worker, head, now, self._settings)
            if order_key is not None and head is not None and worker.can_take(head):
                self._give(head, worker, now, order_key)
        if self._policy.preempts and line.num_requests and may_be_below_share(worker, self._settings):
            self._make_room(worker, now)
        # Half of what was looked at last time may have left, or been overtaken, before it is looked at again.
        pushed, removed = worker.prefetched_at
        changes = max(line.num_pushed - pushed, line.num_removed - removed)
        if line.num_requests and changes >= max(1, self._settings.max_prefetches // 2):
            worker.prefetched_at = (line.num_pushed, line.num_removed)
            self._prefetch(worker, line)

    def _make_room(self, worker: Worker, now: float) -> None:
        """For a tenant that has far less than its share of the worker."""
        if (found := make_room(worker, now, self._settings)) is not None:
            request, order_key = found
            request.order_key = order_key if request.order_key is None else min(request.order_key, order_key)
            self._give(request, worker, now)

    def _help(self, workers: list[Worker], now: float) -> bool:
        """Workers with nothing to do, and those of `workers` with nothing in line, take over from lines that are far
        behind; True if one did."""
        if not self._backlog.num_requests:
            return False
        looked_at = set(workers)
        idle = [
            worker
            for worker in self._fleet.ready
            if not worker.line.num_requests and not worker.full and (worker in looked_at or not worker.requests)
        ]
        if not idle:
            return False
        donors = {
            worker: self._placement.load(worker) for worker in self._fleet.workers if worker.line.num_requests > 0
        }
        helped = False
        for worker in idle:
            while donors and not worker.full:
                if (found := self._takeover(worker, donors)) is None:
                    break
                donor, request = found
                self._give(request, worker, now)
                helped = True
                donors[donor] = self._placement.load(donor)
                if not donor.line.num_requests:
                    del donors[donor]
        return helped

    def _takeover(self, worker: Worker, donors: dict[Worker, int]) -> tuple[Worker, Request] | None:
        """What the worker should take from whose line; `donors` are the owners of lines by their load in tokens.

        A request of an adapter that it runs already, from one of the busiest; else one of those that the busiest would
        take next: that of the adapter which the fewest workers have.
        """
        own = self._placement.load(worker)
        busiest = sorted(donors, key=lambda other: (donors[other], other.worker_id), reverse=True)
        if worker.requests:
            busiest = busiest[:_DONORS]
        behind = [other for other in busiest if not worker.requests or self._placement.is_far_above(donors[other], own)]
        for donor in behind:
            heads = donor.line.heads_of(worker.in_use.names)
            for request in heads[: self._settings.lookahead_lanes]:
                if self._selection.fits(worker, request):
                    return donor, request
        # With nothing to do it takes from whomever it can.
        for donor in behind[:1] if worker.requests else behind:
            candidates = donor.line.candidates(self._settings.lookahead_lanes)
            fitting = [
                request
                for request in candidates
                if self._may_take_over(worker, request) and self._selection.fits(worker, request)
            ]
            if fitting:
                return donor, min(fitting, key=lambda request: self._placement.num_homes(request.adapter))
        return None

    def _may_take_over(self, worker: Worker, request: Request) -> bool:
        """Not so that an adapter gets homes too fast, unless the worker has nothing to do."""
        return not worker.requests or worker.has(request.adapter) or self._placement.may_grow(request.adapter)

    def _prefetch(self, worker: Worker, line: Line) -> None:
        """Has adapters fetched that will be needed next."""
        candidates = line.candidates(self._settings.max_prefetches)
        for request in list(candidates):
            self._selection.num_looks += 1
            if request.adapter and worker.note_prefetch(request.adapter):
                worker.command(Prefetch(request.tenant, request.adapter, request.adapter_bytes))

    def _give(self, request: Request, worker: Worker, now: float, order_key: int | None = None) -> None:
        self._life.offer(request, worker, now, order_key)
        self._num_offered += 1
