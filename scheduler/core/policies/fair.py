"""Two levels of weighted fair queuing in modelled seconds: tenants, then the adapters of each."""

from scheduler.core.costs import CostModel
from scheduler.core.lazy_heap import Place
from scheduler.core.ledger import Ledger
from scheduler.core.model import Request
from scheduler.core.policies.protocol import LaneName, Unit
from scheduler.core.policies.vtc import Metered


class Fair(Metered):
    """The earliest virtual deadline goes first, among tenants, among a tenant's adapters, and among their requests.

    A tenant's deadline is its counter plus the cost of its next request over its weight: what it would have had if the
    request were finished. This is UWFQ (TU Delft, 2025) with corrections: deadlines of one tenant are chained, because
    each request moves the counter by its cost when it starts, and the counter follows what was really used, so that
    an estimate cannot be exploited. Small requests finish early; nobody finishes later than with an equal share by
    more than the largest request.

    Inside a lane a request's deadline is its tenant's virtual time when it arrived plus its cost: short ones first,
    but the clock moves on, so that a long one is overtaken only by what arrives while its tenant has that much service.
    A higher priority goes first in its tenant.
    """

    clusters = True
    preempts = True
    unit: Unit = "seconds"

    def __init__(self, ledger: Ledger, costs: CostModel) -> None:
        super().__init__(ledger)
        self._costs = costs
        self._adapters: dict[str, Ledger] = {}

    def lane_of(self, request: Request) -> LaneName:
        return request.tenant, request.adapter

    def request_place(self, request: Request) -> Place:
        return -request.priority, request.virtual_deadline, request.number

    def lane_place(self, name: LaneName, head: Request) -> Place:
        return -head.priority, self._adapters_of(name[0]).counter(name[1]) + head.cost

    def group_place(self, group: str, head: Request) -> Place:
        return (self.ledger.counter(group) + head.cost / self.ledger.weight(group),)

    def ahead(self, request: Request, other: Request) -> float:
        return self.ledger.counter(request.tenant) - self.ledger.counter(other.tenant)

    def queued(self, request: Request) -> None:
        super().queued(request)
        adapters = self._adapters_of(request.tenant)
        adapters.join(request.adapter)
        adapters.queue(request.adapter)
        weight = self.ledger.weight(request.tenant)
        request.virtual_deadline = self.ledger.counter(request.tenant) + request.cost / weight

    def unqueued(self, request: Request) -> None:
        adapters = self._adapters_of(request.tenant)
        adapters.unqueue(request.adapter)
        self._leave(request, adapters)
        super().unqueued(request)

    def started(self, request: Request) -> None:
        self._adapters_of(request.tenant).join(request.adapter)
        super().started(request)

    def ended(self, request: Request, *, returned: bool) -> None:
        super().ended(request, returned=returned)
        self._leave(request, self._adapters_of(request.tenant))

    def charge_difference(self, request: Request, service: float) -> None:
        super().charge_difference(request, service)
        self._adapters_of(request.tenant).charge(request.adapter, service)

    def price_at_start(self, request: Request) -> float:
        return request.cost

    def price(self, request: Request) -> float:
        output = max(0, request.generated_tokens - request.delivered_tokens)
        return self._costs.service_seconds(request.prompt_tokens, output)

    def _adapters_of(self, tenant: str) -> Ledger:
        ledger = self._adapters.get(tenant)
        if ledger is None:
            ledger = self._adapters[tenant] = Ledger({})
        return ledger

    def _leave(self, request: Request, adapters: Ledger) -> None:
        adapters.leave(request.adapter)
        if not adapters.num_active:
            self._adapters.pop(request.tenant, None)
