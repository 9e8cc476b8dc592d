"""Which worker a request goes to: where its adapter is, unless that worker has far more work than another."""

from collections.abc import Iterable
from dataclasses import dataclass

from scheduler.core.model import Reason, Request, Tier
from scheduler.core.settings import Settings
from scheduler.core.waiting import Lane
from scheduler.core.worker import Worker


@dataclass(frozen=True, slots=True)
class Choice:
    """The worker a request goes to now, or waits for; None when no worker could ever take it."""

    worker: Worker | None
    # None while the request must wait.
    reason: Reason | None = None


class Placement:
    """Chooses workers for the heads of the lanes, oldest first, in one round of `schedule()`.

    A request that has to wait reserves the worker it waits for: no later request goes there in this round. So the
    oldest request is overtaken only on workers it does not wait for, the load of the worker it waits for only falls,
    and it is placed in the end.
    """

    def __init__(self, workers: Iterable[Worker], settings: Settings) -> None:
        self.workers = [worker for worker in workers if not worker.draining]
        self._settings = settings
        self._reserved: set[str] = set()
        # Worker id -> tokens that wait for it in lanes set aside in this round.
        self._pressure: dict[str, int] = {}

    @property
    def exhausted(self) -> bool:
        """No worker can be given anything more in this round."""
        return all(worker.full or worker.worker_id in self._reserved for worker in self.workers)

    def choose(self, lane: Lane, request: Request) -> Choice:
        """Decides for the head of a lane. O(workers) plus the admission test of those it is tried on."""
        able = sorted((worker for worker in self.workers if worker.could_ever_take(request)), key=self._rank)
        if not able:
            return Choice(None)
        homes = [worker for worker in able if request.adapter and worker.has(request.adapter)]
        others = [worker for worker in able if worker not in homes]
        if not homes:
            free = [worker for worker in others if worker.worker_id not in self._reserved]
            if request.adapter:
                free = self._fewest_adapters_first(free)
            taker = self._first_that_can_take(free, request)
            return Choice(taker, _reason(taker, request)) if taker else self._wait(free or others, lane)
        home = self._first_that_can_take(homes, request)
        # What waits in front of a full home is its work too.
        load = self._load(homes[0]) + (0 if home else lane.tokens)
        relief = self._relief(others, request, load, home)
        if relief:
            return Choice(relief, Reason.SPILL)
        return Choice(home, _reason(home, request)) if home else self._wait(homes, lane)

    def _relief(self, others: list[Worker], request: Request, load: int, home: Worker | None) -> Worker | None:
        """Another worker that is clearly better off than the homes, whose least load in tokens is `load`."""
        for other in others:
            idle = not other.requests and home is None
            if idle or load > self._limit(other):
                if self._can_take(other, request):
                    return other
                if home is None:
                    self._reserved.add(other.worker_id)
        return None

    def _fewest_adapters_first(self, workers: list[Worker]) -> list[Worker]:
        """Spreads cold adapters over workers of about the same load, since requests will follow them.

        `workers` are sorted by load; those clearly above the first stay behind the others.
        """
        limit = self._limit(workers[0]) if workers else 0
        return sorted(workers, key=lambda worker: (self._load(worker) > limit, worker.num_adapters))

    def _limit(self, worker: Worker) -> float:
        """Tokens above which the load of another is clearly greater than this worker's."""
        return self._settings.spill_ratio * self._load(worker) + self._settings.spill_margin_tokens

    def _wait(self, workers: list[Worker], lane: Lane) -> Choice:
        """The lane waits for the first of `workers` that no older request waits for."""
        free = (worker for worker in workers if worker.worker_id not in self._reserved)
        worker = next(free, workers[0])
        self._reserved.add(worker.worker_id)
        self._pressure[worker.worker_id] = self._pressure.get(worker.worker_id, 0) + lane.tokens
        return Choice(worker)

    def _first_that_can_take(self, workers: list[Worker], request: Request) -> Worker | None:
        return next((worker for worker in workers if self._can_take(worker, request)), None)

    def _can_take(self, worker: Worker, request: Request) -> bool:
        return worker.worker_id not in self._reserved and worker.can_take(request)

    def _load(self, worker: Worker) -> int:
        """Tokens in front of a newcomer."""
        return worker.outstanding_tokens + self._pressure.get(worker.worker_id, 0)

    def _rank(self, worker: Worker) -> tuple[int, int, str]:
        """The least loaded first; among equals the one that was given least."""
        return self._load(worker), worker.given_tokens, worker.worker_id


def _reason(worker: Worker, request: Request) -> Reason:
    if not request.adapter or worker.uses(request.adapter) or worker.tier(request.adapter) is Tier.PAGES:
        return Reason.RESIDENT
    return Reason.HOST_HIT if worker.tier(request.adapter) is Tier.HOST else Reason.COLD
