"""The Virtual Token Counter: whoever has had the fewest tokens goes first."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from scheduler.core.lazy_heap import Place
from scheduler.core.ledger import Ledger
from scheduler.core.model import Request
from scheduler.core.policies.protocol import LaneName, Unit, Unmetered

# Prices of a token (Sheng et al., OSDI 2024).
INPUT_PRICE = 1.0
OUTPUT_PRICE = 2.0


class Metered(Unmetered, ABC):
    """Charges a client for its requests, in a ledger of all clients. Subclasses say what service is."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def wait_seconds(self, request: Request, line_seconds: float, own_seconds: float) -> float:
        """Its tenant gets its share of the service, and all of it once the others have none left to wait for."""
        weight = self.ledger.weight(request.tenant)
        others = self.ledger.queued_weight - (weight if self.ledger.is_queued(request.tenant) else 0.0)
        return min(line_seconds, own_seconds * (weight + others) / weight)

    def service(self, tenant: str) -> float | None:
        return self.ledger.counter(tenant)

    def deficits(self) -> Mapping[str, float]:
        return self.ledger.deficits()

    def queued(self, request: Request) -> None:
        self.ledger.join(request.tenant)
        self.ledger.queue(request.tenant)

    def unqueued(self, request: Request) -> None:
        self.ledger.unqueue(request.tenant)
        self.ledger.leave(request.tenant)

    def started(self, request: Request) -> None:
        self.ledger.join(request.tenant)
        self.charge(request, self.price_at_start(request))

    def served(self, request: Request) -> None:
        self.charge(request, max(request.charged, self.price(request)))

    def ended(self, request: Request, *, returned: bool) -> None:
        self.charge(request, 0.0 if returned else self.price(request))
        self.ledger.leave(request.tenant)

    def charge(self, request: Request, total: float) -> None:
        """The request has cost `total` so far."""
        if total != request.charged:
            self.charge_difference(request, total - request.charged)
            request.charged = total

    def charge_difference(self, request: Request, service: float) -> None:
        self.ledger.charge(request.tenant, service)

    @abstractmethod
    def price_at_start(self, request: Request) -> float:
        """What it is charged when it is given to a worker."""

    @abstractmethod
    def price(self, request: Request) -> float:
        """Of what it has had so far."""


class VirtualTokenCounter(Metered):
    """VTC with tenants as clients: the oldest request of the tenant with the least counter goes first.

    Input is charged when a request is given to a worker, output as it is generated. What differs from S-LoRA's code:
    requests of the base model count like any other, a client that returns while others merely run is lifted too, and
    a head that does not fit does not stop the others (`Line.candidates`). A higher priority goes first in its tenant.
    """

    unit: Unit = "tokens"

    def lane_of(self, request: Request) -> LaneName:
        return request.tenant, ""

    def request_place(self, request: Request) -> Place:
        return -request.priority, request.number

    def lane_place(self, name: LaneName, head: Request) -> Place:
        return ()

    def group_place(self, group: str, head: Request) -> Place:
        return (self.ledger.counter(group),)

    def price_at_start(self, request: Request) -> float:
        return INPUT_PRICE * request.prompt_tokens

    def price(self, request: Request) -> float:
        output = max(0, request.generated_tokens - request.delivered_tokens)
        return INPUT_PRICE * request.prompt_tokens + OUTPUT_PRICE * output
