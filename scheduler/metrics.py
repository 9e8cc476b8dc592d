"""The scheduler's figures. Labels hold the base model's name and values fixed in code, never a client's string."""

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from common.top_labels import OTHER, TopLabels
from scheduler.core.commands import Offer, Refusal
from scheduler.core.intake import NonsenseError
from scheduler.core.model import Reason

WAIT_BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
DECISION_BUCKETS = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.1)
_DEFICIT_TEXTS = {
    "seconds": "Service that a waiting tenant lacks of its share; with policy fair",
    "tokens": "The same with policy vtc: input tokens plus twice the output",
}
# Until the first worker has said which model it serves.
UNKNOWN_MODEL = "unknown"


def active_gauge(registry: CollectorRegistry) -> Gauge:
    """The one figure that a standby has too."""
    return Gauge("loraplex_scheduler_active", "1 while this scheduler is the one that decides", registry=registry)


class FairnessDeficit(Collector):
    """How far tenants that wait are behind their share, computed when somebody asks.

    Tenants that submit most are named, whether they wait or not; the others are one figure, that of whoever is
    furthest behind.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        unit: Literal["seconds", "tokens"],
        deficits: Callable[[], Mapping[str, float]],
        max_tenant_labels: int,
    ) -> None:
        """`deficits`, in `unit`, is called from the thread that renders."""
        self._unit = unit
        self._deficits = deficits
        self._top = TopLabels(max_tenant_labels)
        registry.register(self)

    def submitted(self, tenant: str) -> None:
        """One more request of the tenant. From one thread only."""
        self._top.fold(tenant)

    def collect(self) -> Iterable[Metric]:
        deficits = self._deficits()
        shown = dict.fromkeys([*self._top.names, OTHER], 0.0)
        for tenant, deficit in deficits.items():
            label = tenant if tenant in shown else OTHER
            shown[label] = max(shown[label], deficit)
        name = f"loraplex_scheduler_fairness_deficit_{self._unit}"
        gauge = GaugeMetricFamily(name, _DEFICIT_TEXTS[self._unit], labels=["tenant"])
        for label, deficit in shown.items():
            gauge.add_metric([label], deficit)
        return [gauge]


class SchedulerMetrics:
    """Gauges of the queue and the fleet, counters and histograms of the decisions, in seconds and tokens."""

    def __init__(self, registry: CollectorRegistry, oldest_age_seconds: Callable[[], float]) -> None:
        """`oldest_age_seconds` is called from the thread that renders."""

        def name(suffix: str) -> str:
            return f"loraplex_scheduler_{suffix}"

        self.model = ""
        self._oldest_age_seconds = oldest_age_seconds
        self._queued_requests = Gauge(
            name("queued_requests"), "Requests that no worker has", ("model",), registry=registry
        )
        self._queued_tokens = Gauge(
            name("queued_tokens"), "Their prompts plus max_tokens", ("model",), registry=registry
        )
        self._oldest_age = Gauge(
            name("oldest_request_age_seconds"), "How long the oldest of them waits", ("model",), registry=registry
        )
        self._workers = Gauge(name("workers"), "Registered workers", ("state",), registry=registry)
        self._dispatched = Counter(
            name("dispatch_total"), "Offers by why the worker was chosen", ("reason",), registry=registry
        )
        self._queue_wait = Histogram(
            name("queue_wait_seconds"),
            "From submission to the offer, by where the worker had the adapter",
            ("model", "residency"),
            registry=registry,
            buckets=WAIT_BUCKETS,
        )
        self.decision_seconds = Histogram(
            name("decision_seconds"), "One call of schedule()", registry=registry, buckets=DECISION_BUCKETS
        )
        self.residency_gaps = Counter(
            name("residency_sync_gap_total"),
            "Missing changes of residency: the worker registers anew",
            registry=registry,
        )
        self._lost = Counter(
            name("worker_lost_total"),
            "Workers whose stream ended, by how",
            ("reason",),
            registry=registry,
        )
        self._refused = Counter(name("refusals_total"), "Requests refused, by code", ("code",), registry=registry)
        self.gateways = Gauge(name("gateways"), "Connected gateways", registry=registry)
        self._fenced = Counter(
            name("workers_fenced_total"), "Workers kept out, by what they reported", ("reason",), registry=registry
        )
        for reason_ in NonsenseError.REASONS:
            self._fenced.labels(reason_)
        for code in ("DEADLINE_EXCEEDED", "FAILED_PRECONDITION", "RESOURCE_EXHAUSTED", "UNAVAILABLE"):
            self._refused.labels(code)
        for how in ("exit", "deregistered"):
            self._lost.labels(how)
        for reason in Reason:
            self._dispatched.labels(reason.value)
        self.set_model(UNKNOWN_MODEL)
        self.set_workers(0, 0)

    def set_model(self, model: str) -> None:
        """The base model's name, from now on."""
        if model == self.model:
            return
        gauges = (self._queued_requests, self._queued_tokens, self._oldest_age)
        for gauge in gauges:
            if self.model:
                gauge.remove(self.model)
            gauge.labels(model)
        self.model = model
        self._oldest_age.labels(model).set_function(self._oldest_age_seconds)

    def set_queue(self, num_requests: int, num_tokens: int) -> None:
        self._queued_requests.labels(self.model).set(num_requests)
        self._queued_tokens.labels(self.model).set(num_tokens)

    def set_workers(self, num_ready: int, num_draining: int) -> None:
        self._workers.labels("ready").set(num_ready)
        self._workers.labels("draining").set(num_draining)

    def worker_lost(self, *, draining: bool) -> None:
        self._lost.labels("deregistered" if draining else "exit").inc()

    def fenced(self, reason: str) -> None:
        self._fenced.labels(reason).inc()

    def refused(self, refusal: Refusal) -> None:
        self._refused.labels(refusal.code).inc()

    def offered(self, offer: Offer) -> None:
        residency = offer.tier.value if offer.tier else "none"
        self._dispatched.labels(offer.reason.value).inc()
        self._queue_wait.labels(self.model, residency).observe(offer.queued_seconds)
