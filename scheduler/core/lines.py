"""What waits for one worker: groups of lanes of requests, each level in the order of a policy."""

import heapq
from collections.abc import Generator, Iterable, Iterator

from scheduler.core.homes import Home
from scheduler.core.lazy_heap import LazyHeap, Place
from scheduler.core.model import Request
from scheduler.core.policies.protocol import LaneName, Policy

# After so many lanes of one group that do not fit, another group has its turn.
_LANES_OF_A_GROUP = 2


class Lane:
    """Queued requests that are taken in a fixed order; the policy may turn it round when it is reversible."""

    def __init__(self, name: LaneName, policy: Policy) -> None:
        self.name = name
        self._policy = policy
        self._requests: dict[int, Request] = {}
        # (place, number); those of removed requests leave when they reach the top.
        self._heap: list[tuple[Place, int]] = []
        self._head: Request | None = None
        # Numbers, the newest first; only when the policy may turn the lane round.
        self._newest: list[int] = []
        self._reversible = policy.reversible

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests.values())

    @property
    def head(self) -> Request | None:
        if self._reversible and self._policy.newest_first:
            while self._newest and -self._newest[0] not in self._requests:
                heapq.heappop(self._newest)
            return self._requests[-self._newest[0]] if self._newest else None
        return self._head

    def push(self, request: Request) -> None:
        self._requests[request.number] = request
        heapq.heappush(self._heap, (self._policy.request_place(request), request.number))
        self._head = self._requests[self._heap[0][1]]
        if self._reversible:
            heapq.heappush(self._newest, -request.number)

    def remove(self, request: Request) -> None:
        """Raises KeyError when the request is not here."""
        del self._requests[request.number]
        if request is self._head:
            while self._heap and self._heap[0][1] not in self._requests:
                heapq.heappop(self._heap)
            self._head = self._requests[self._heap[0][1]] if self._heap else None


class Line:
    """Requests that wait for one worker. Pushing and taking is O(log n)."""

    def __init__(self, policy: Policy, home: Home | None = None) -> None:
        """`home` is that of the worker whose line it is."""
        self.num_requests = 0
        self.num_tokens = 0
        # Requests that ever came, and that ever left.
        self.num_pushed = 0
        self.num_removed = 0
        # No request here has a larger adapter.
        self.largest_adapter_bytes = 0
        # Service that its requests are expected to take, in seconds; of each tenant too.
        self.cost_seconds = 0.0
        self._tenants: dict[str, float] = {}
        self._policy = policy
        self._home = home
        self._lanes: dict[LaneName, Lane] = {}
        # Adapter -> lanes with requests that need it -> how many.
        self._adapters: dict[str, dict[LaneName, int]] = {}
        # Group -> its lanes in the policy's order.
        self._groups: dict[str, LazyHeap[LaneName]] = {}
        self._order: LazyHeap[str] = LazyHeap(self._group_place)

    def __iter__(self) -> Iterator[Request]:
        """Lane by lane, in no particular order."""
        return (request for lane in self._lanes.values() for request in lane)

    @property
    def num_adapters(self) -> int:
        return len(self._adapters)

    def has(self, adapter: str) -> bool:
        """Some request in it needs the adapter."""
        return adapter in self._adapters

    def cost_of(self, tenant: str) -> float:
        """Service that the tenant's requests in it are expected to take, in seconds."""
        return self._tenants.get(tenant, 0.0)

    def _discount(self, request: Request) -> None:
        self._tenants[request.tenant] -= request.cost
        self.cost_seconds -= request.cost
        if not self.num_requests:
            # Sums of floats drift.
            self.cost_seconds = 0.0
            self._tenants.clear()
            self.largest_adapter_bytes = 0

    def push(self, request: Request) -> None:
        name = self._policy.lane_of(request)
        lane = self._lanes.get(name)
        if lane is None:
            lane = self._lanes[name] = Lane(name, self._policy)
        lane.push(request)
        self.num_requests += 1
        self.num_pushed += 1
        self.largest_adapter_bytes = max(self.largest_adapter_bytes, request.adapter_bytes)
        self.num_tokens += request.cost_tokens
        self.cost_seconds += request.cost
        self._tenants[request.tenant] = self._tenants.get(request.tenant, 0.0) + request.cost
        lanes = self._adapters.get(request.adapter)
        if lanes is None:
            lanes = self._adapters[request.adapter] = {}
            if self._home is not None and request.adapter:
                self._home.enter(request.adapter)
        lanes[name] = lanes.get(name, 0) + 1
        self._refresh(name)

    def remove(self, request: Request) -> None:
        """Raises KeyError when the request is not here."""
        name = self._policy.lane_of(request)
        lane = self._lanes[name]
        lane.remove(request)
        self.num_requests -= 1
        self.num_removed += 1
        self.num_tokens -= request.cost_tokens
        self._discount(request)
        lanes = self._adapters[request.adapter]
        lanes[name] -= 1
        if not lanes[name]:
            del lanes[name]
        if not lanes:
            del self._adapters[request.adapter]
            if self._home is not None and request.adapter:
                self._home.leave(request.adapter)
        if lane.head is None:
            del self._lanes[name]
        self._refresh(name)

    def head(self) -> Request | None:
        """The request that the policy would take first."""
        group = self._order.top()
        lane = self._groups[group].top() if group is not None else None
        return self._lanes[lane].head if lane is not None else None

    def candidates(self, limit: int) -> Generator[Request, None, None]:
        """Heads of up to `limit` lanes that are not taken, in the policy's order.

        A request that is removed while it is looked at is followed by the next in order, and does not count; one that
        stays sets its lane aside until the generator is closed.
        """
        lanes: list[LaneName] = []
        groups: dict[str, int] = {}
        try:
            while len(lanes) < limit and (group := self._order.top()) is not None:
                name = self._groups[group].top()
                if name is None or groups.get(group, 0) >= _LANES_OF_A_GROUP:
                    self._order.pop(group)
                    groups.setdefault(group, 0)
                    continue
                head = self._lanes[name].head
                assert head is not None
                yield head
                lane = self._lanes.get(name)
                if lane is not None and lane.head is head:
                    self._groups[group].pop(name)
                    lanes.append(name)
                    groups[group] = groups.get(group, 0) + 1
        finally:
            for group in groups:
                if group in self._groups:
                    self._order.pop(group)
            for name in lanes:
                self._refresh(name)
            for group in groups:
                self._order.push(group)

    def heads_of(self, adapters: Iterable[str]) -> list[Request]:
        """Heads of the lanes with requests of these adapters, in the policy's order."""
        names = list({name: None for adapter in adapters for name in self._adapters.get(adapter, ())})
        names.sort(key=lambda name: (self._group_place(name[0]) or (), self._lane_place(name) or (), name))
        return [head for name in names if (head := self._lanes[name].head) is not None]

    def _refresh(self, name: LaneName) -> None:
        """A lane or its head has changed."""
        group = name[0]
        lanes = self._groups.get(group)
        if lanes is None:
            lanes = self._groups[group] = LazyHeap(self._lane_place)
        lanes.push(name)
        if lanes.top() is None:
            del self._groups[group]
        else:
            self._order.push(group)

    def _lane_place(self, name: LaneName) -> Place | None:
        lane = self._lanes.get(name)
        if lane is None or (head := lane.head) is None:
            return None
        return self._policy.lane_place(name, head)

    def _group_place(self, group: str) -> Place | None:
        lanes = self._groups.get(group)
        if lanes is None or (name := lanes.top()) is None or (head := self._lanes[name].head) is None:
            return None
        return self._policy.group_place(group, head)
