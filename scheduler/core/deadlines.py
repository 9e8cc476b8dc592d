"""When a queued request is lost: its time is up, or its first token cannot come within its objective any more."""

import heapq
import itertools
from collections.abc import Callable, Iterator

from scheduler.core.model import Request, RequestState, Tier
from scheduler.core.policies.protocol import Policy
from scheduler.core.settings import Settings
from scheduler.core.worker import Worker

# Times of requests that are not queued any more are swept out when there are more than these.
_SPARE_TIMES = 64
# A model of a worker's steps that has seen fewer reports refuses nobody.
_MIN_REPORTS = 8


class Deadlines:
    """Queued requests by the time at which they are lost. O(log n)."""

    def __init__(self, is_queued: Callable[[Request], bool]) -> None:
        self._is_queued = is_queued
        self._heap: list[tuple[float, int, Request]] = []
        self._numbers = itertools.count()

    def push(self, request: Request, lost_at: float, num_queued: int) -> None:
        heapq.heappush(self._heap, (lost_at, next(self._numbers), request))
        if len(self._heap) > 2 * num_queued + _SPARE_TIMES:
            self._heap = [entry for entry in self._heap if self._is_queued(entry[2])]
            heapq.heapify(self._heap)

    @property
    def next_time(self) -> float | None:
        while self._heap and not self._is_queued(self._heap[0][2]):
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def take_due(self, now: float) -> Iterator[Request]:
        """Queued requests whose time has come; their times are forgotten."""
        while self._heap and self._heap[0][0] <= now:
            request = heapq.heappop(self._heap)[2]
            if self._is_queued(request):
                yield request


class Estimator:
    """How long a request will wait for its first token, in seconds."""

    def __init__(self, policy: Policy, settings: Settings) -> None:
        self._policy = policy
        self._settings = settings

    def lost_at(self, request: Request, worker: Worker | None) -> float | None:
        """When it is too late to begin with the request; None when it may wait for ever.

        With policy `abort` the rule of S-LoRA (appendix B), which takes the same time for every prefill; otherwise
        what its adapter and its prompt need on the worker that it waits for.
        """
        times = [] if request.deadline is None else [request.deadline]
        if request.slo_seconds is not None:
            if self._settings.policy == "abort":
                work = self._settings.abort_prefill_seconds
            else:
                work = self.work_seconds(request, worker) if worker is not None and _knows(worker) else 0.0
            times.append(request.arrived + request.slo_seconds - work)
        return min(times, default=None)

    def shortage(self, request: Request, worker: Worker) -> float:
        """Seconds by which a newcomer will miss its objective if it queues here; 0 when it may make it."""
        if request.slo_seconds is None or self._settings.policy == "abort" or not _knows(worker):
            return 0.0
        wait = self.queue_seconds(request, worker) + self.work_seconds(request, worker)
        return max(0.0, wait - request.slo_seconds)

    def queue_seconds(self, request: Request, worker: Worker) -> float:
        """Until the worker is given the request: what is before it in the line, by the share of its tenant."""
        line = worker.line
        if not line.num_requests and worker.can_take(request):
            return 0.0
        return self._policy.wait_seconds(request, line.cost_seconds, line.cost_of(request.tenant))

    def work_seconds(self, request: Request, worker: Worker) -> float:
        """From there to the first token: bringing its adapter, computing what is not cached of its prompt."""
        tokens = max(1, request.prompt_tokens + request.delivered_tokens - worker.cached_tokens(request))
        return self.load_seconds(request, worker) + worker.costs.step_seconds(tokens, worker.num_running, 1)

    def load_seconds(self, request: Request, worker: Worker) -> float:
        if not request.adapter or worker.uses(request.adapter):
            return 0.0
        tier = worker.tier(request.adapter)
        if tier is Tier.PAGES:
            return 0.0
        load = request.adapter_bytes / self._settings.load_bytes_per_second
        if tier is Tier.HOST or worker.has(request.adapter):
            return load
        return load + request.adapter_bytes / self._settings.fetch_bytes_per_second


def _knows(worker: Worker) -> bool:
    return worker.costs.num_reports >= _MIN_REPORTS


def is_queued(request: Request) -> bool:
    return request.state is RequestState.QUEUED and request.line_id is not None
