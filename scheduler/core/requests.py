"""Every attempt the scheduler knows, by key and by gateway."""

from dataclasses import dataclass, field

from scheduler.core.commands import Placed, Refused
from scheduler.core.model import Key, Request


@dataclass(slots=True)
class Gateway:
    """A gateway that is connected, or was a moment ago."""

    gateway_id: str
    # Counts its streams.
    connection: int = 0
    # When what it left behind is aborted; None while it is connected.
    lost_until: float | None = None
    requests: dict[Key, Request] = field(default_factory=dict)
    # What it was not told yet.
    answers: list[Placed | Refused] = field(default_factory=list)


class RequestTable:
    """Attempts from submission until they have ended or are forgotten."""

    def __init__(self) -> None:
        self.gateways: dict[str, Gateway] = {}
        self._requests: dict[Key, Request] = {}
        # (tenant, request id) -> the newest attempt.
        self._newest: dict[tuple[str, str], Request] = {}

    def get(self, key: Key) -> Request | None:
        return self._requests.get(key)

    def newest(self, key: Key) -> Request | None:
        """The newest known attempt at the same request."""
        return self._newest.get((key.tenant, key.request_id))

    def attempts(self, request_id: str) -> list[Request]:
        """Of all tenants, in order of arrival. O(n): for operators."""
        found = [request for key, request in self._requests.items() if key.request_id == request_id]
        return sorted(found, key=lambda request: request.number)

    def add(self, request: Request) -> None:
        key = request.key
        self._requests[key] = request
        newest = self.newest(key)
        if newest is None or newest.key.attempt <= key.attempt:
            self._newest[key.tenant, key.request_id] = request
        self.claim(request, request.gateway_id)

    def claim(self, request: Request, gateway_id: str) -> None:
        """The request belongs to this gateway's present connection from now on."""
        self._disown(request)
        request.gateway_id = gateway_id
        if gateway := self.gateways.get(gateway_id):
            request.connection = gateway.connection
            gateway.requests[request.key] = request

    def remove(self, request: Request) -> None:
        key = request.key
        del self._requests[key]
        if self.newest(key) is request:
            del self._newest[key.tenant, key.request_id]
        self._disown(request)

    def connect(self, gateway_id: str) -> None:
        """A new stream of a gateway, which may have requests of an earlier one."""
        gateway = self.gateways.setdefault(gateway_id, Gateway(gateway_id))
        gateway.connection += 1
        gateway.lost_until = None

    def answer(self, request: Request, answer: Placed | Refused) -> None:
        """For the request's gateway, when it is there or comes back soon."""
        if gateway := self.gateways.get(request.gateway_id):
            gateway.answers.append(answer)

    def take_answers(self) -> dict[str, list[Placed | Refused]]:
        """Gateway id -> answers since the last call, of those that are connected."""
        taken = {}
        for gateway in self.gateways.values():
            if gateway.answers and gateway.lost_until is None:
                taken[gateway.gateway_id], gateway.answers = gateway.answers, []
        return taken

    def _disown(self, request: Request) -> None:
        if gateway := self.gateways.get(request.gateway_id):
            gateway.requests.pop(request.key, None)
