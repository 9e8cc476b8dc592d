"""The queue: one lane per adapter, and the oldest head of all lanes goes first."""

import heapq
from collections.abc import Generator, Iterator

from scheduler.core.model import Request


class Lane:
    """Queued requests of one adapter (or of the base model), oldest first."""

    def __init__(self, adapter: str) -> None:
        self.adapter = adapter
        # Tokens of all its requests.
        self.tokens = 0
        self._requests: dict[int, Request] = {}
        # Order keys; those of removed requests leave when they reach the top.
        self._heap: list[int] = []

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests.values())

    @property
    def head(self) -> Request | None:
        while self._heap and self._heap[0] not in self._requests:
            heapq.heappop(self._heap)
        return self._requests[self._heap[0]] if self._heap else None

    def push(self, request: Request) -> None:
        self._requests[request.order_key] = request
        self.tokens += request.cost_tokens
        heapq.heappush(self._heap, request.order_key)

    def remove(self, request: Request) -> None:
        del self._requests[request.order_key]
        self.tokens -= request.cost_tokens


class WaitingQueue:
    """Requests that no worker has, in the order of their keys within each lane. Pushing and taking is O(log n)."""

    def __init__(self) -> None:
        self._lanes: dict[str, Lane] = {}
        # (order key of a head, adapter); entries that are not heads any more are skipped.
        self._heads: list[tuple[int, str]] = []
        self.num_requests = 0
        self.num_tokens = 0

    def __iter__(self) -> Iterator[Request]:
        """Lane by lane, in no particular order."""
        return (request for lane in self._lanes.values() for request in lane)

    def push(self, request: Request) -> None:
        lane = self._lanes.get(request.adapter)
        if lane is None:
            lane = self._lanes[request.adapter] = Lane(request.adapter)
        lane.push(request)
        self.num_requests += 1
        self.num_tokens += request.cost_tokens
        if lane.head is request:
            heapq.heappush(self._heads, (request.order_key, lane.adapter))

    def remove(self, request: Request) -> None:
        """Raises KeyError when the request is not queued."""
        lane = self._lanes[request.adapter]
        was_head = lane.head is request
        lane.remove(request)
        self.num_requests -= 1
        self.num_tokens -= request.cost_tokens
        head = lane.head
        if head is None:
            del self._lanes[request.adapter]
        elif was_head:
            heapq.heappush(self._heads, (head.order_key, lane.adapter))

    def heads(self) -> Generator[tuple[Lane, Request], None, None]:
        """Each lane's head, oldest first.

        A head that is removed while it is looked at is followed by the next of its lane; one that stays makes its
        whole lane wait until the next call.
        """
        seen: dict[str, int] = {}
        try:
            while self._heads:
                order_key, adapter = heapq.heappop(self._heads)
                head = self._head(adapter)
                if head is None or head.order_key != order_key or seen.get(adapter) == order_key:
                    continue
                seen[adapter] = order_key
                yield self._lanes[adapter], head
        finally:
            for adapter, order_key in seen.items():
                heapq.heappush(self._heads, (order_key, adapter))

    @property
    def oldest(self) -> Request | None:
        """The head of all lanes."""
        while self._heads:
            order_key, adapter = self._heads[0]
            head = self._head(adapter)
            if head is not None and head.order_key == order_key:
                return head
            heapq.heappop(self._heads)
        return None

    def position(self, request: Request) -> int:
        """From 1 for the oldest. O(n): for operators."""
        return 1 + sum(other.order_key < request.order_key for other in self)

    def _head(self, adapter: str) -> Request | None:
        lane = self._lanes.get(adapter)
        return lane.head if lane else None
