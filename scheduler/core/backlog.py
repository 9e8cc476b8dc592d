"""Everything that waits: a line for each worker, and one for requests that no worker can have yet."""

import heapq
from collections.abc import Iterator

from scheduler.core.lines import Line
from scheduler.core.model import Request
from scheduler.core.policies.protocol import Policy

# The line of requests that wait for a worker to come.
NO_WORKER = ""


class Backlog:
    """Queued requests by the worker they wait for. Pushing, moving and taking is O(log n)."""

    def __init__(self, policy: Policy) -> None:
        self.num_requests = 0
        self.num_tokens = 0
        self._policy = policy
        self._lines = {NO_WORKER: Line(policy)}
        # Numbers of queued requests; those that left leave when they reach the top.
        self._arrivals: list[int] = []
        self._requests: dict[int, Request] = {}

    def __iter__(self) -> Iterator[Request]:
        """In no particular order."""
        return iter(self._requests.values())

    def open_line(self, worker_id: str, line: Line) -> None:
        """The worker has come, and this is its line; it must have no other."""
        self._lines[worker_id] = line

    def push(self, request: Request, worker_id: str) -> None:
        """The request waits from now on, for this worker."""
        self._policy.queued(request)
        self._requests[request.number] = request
        heapq.heappush(self._arrivals, request.number)
        self.num_requests += 1
        self.num_tokens += request.cost_tokens
        request.line_id = worker_id
        self._lines[worker_id].push(request)

    def remove(self, request: Request) -> None:
        """It waits no more. Raises KeyError when it did not."""
        del self._requests[request.number]
        self.num_requests -= 1
        self.num_tokens -= request.cost_tokens
        assert request.line_id is not None
        self._lines[request.line_id].remove(request)
        request.line_id = None
        self._policy.unqueued(request)

    def move(self, request: Request, worker_id: str) -> None:
        """It waits for another worker; its place in time stays."""
        assert request.line_id is not None
        self._lines[request.line_id].remove(request)
        request.line_id = worker_id
        self._lines[worker_id].push(request)

    def end_line(self, worker_id: str) -> list[Request]:
        """The worker takes nothing more: what waited for it, oldest first, waits for no worker until it is moved."""
        requests = self.requests_of(worker_id)
        for request in requests:
            self.move(request, NO_WORKER)
        return requests

    def requests_of(self, worker_id: str) -> list[Request]:
        """What waits for the worker, oldest first."""
        return sorted(self._lines.get(worker_id, ()), key=lambda request: request.number)

    @property
    def oldest(self) -> Request | None:
        """Whichever came first."""
        while self._arrivals and self._arrivals[0] not in self._requests:
            heapq.heappop(self._arrivals)
        return self._requests[self._arrivals[0]] if self._arrivals else None

    def position(self, request: Request) -> int:
        """Among all arrivals that wait, from 1 for the oldest. O(n): for operators."""
        return 1 + sum(number < request.number for number in self._requests)
