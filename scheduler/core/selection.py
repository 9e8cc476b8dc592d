"""Which of the requests in a worker's line it is given next: in the policy's order, within what the worker can hold."""

from collections.abc import Generator, Iterator

from scheduler.core.lines import Line
from scheduler.core.model import Request
from scheduler.core.policies.protocol import Policy
from scheduler.core.settings import Settings
from scheduler.core.worker import Worker


class Selection:
    """Goes through lines; the caller takes out of the line what it is given, before it asks for more."""

    def __init__(self, policy: Policy, settings: Settings) -> None:
        self._policy = policy
        self._settings = settings
        # Heads looked at so far: what decisions cost.
        self.num_looks = 0

    def choose(self, worker: Worker, line: Line, now: float) -> Iterator[Request]:
        """Requests that the worker can take now, one after the other.

        Requests of adapters that it runs already go first when it runs enough adapters, within bounds (`_clustered`).
        A head that does not fit is overtaken by heads of other lanes, at most `max_overtaking` times: then the worker
        gets nothing until it fits.
        """
        passed: list[Request] = []
        candidates = line.candidates(self._settings.lookahead_lanes)
        try:
            while not worker.full:
                if self._policy.clusters:
                    yield from self._clustered(worker, line, now)
                request = next(candidates, None)
                if request is None or worker.full:
                    return
                if self.fits(worker, request):
                    yield request
                    for other in passed:
                        other.overtaken += 1
                else:
                    passed.append(request)
                if any(other.overtaken >= self._settings.max_overtaking for other in passed):
                    return
        finally:
            candidates.close()

    def max_adapters(self, worker: Worker) -> int:
        """Adapters in use above which those go first: a setting, or what costs a small share of a step."""
        if self._settings.max_batch_adapters:
            return self._settings.max_batch_adapters
        return worker.costs.adapters_within(self._settings.adapter_step_share, worker.num_running)

    def _clustered(self, worker: Worker, line: Line, now: float) -> Generator[Request, None, None]:
        """Requests of adapters in use, as long as the head of the line can bear it.

        S-LoRA's clustering (section 4.2) with two bounds: the head has waited for less than `cluster_wait_seconds`, and
        no client gets ahead of the head's by more than `cluster_slack_seconds` of service.
        """
        in_use = worker.in_use.names
        while not worker.full and len(in_use) >= self.max_adapters(worker):
            head = line.head()
            if head is None or not head.adapter or head.adapter in in_use:
                return
            if now - head.arrived >= self._settings.cluster_wait_seconds:
                return
            for request in line.heads_of(in_use)[: self._settings.lookahead_lanes]:
                ahead = self._policy.ahead(request, head)
                if ahead <= self._settings.cluster_slack_seconds and self.fits(worker, request):
                    yield request
                    break
            else:
                return

    def fits(self, worker: Worker, request: Request) -> bool:
        """One admission test."""
        self.num_looks += 1
        return worker.can_take(request)
