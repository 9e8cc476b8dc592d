"""The gateway's figures.

Labels hold the base model's name and values fixed in code. The two exceptions, `adapter` and `tenant`, name what exists
and are bounded: the busiest under their own name, the rest as `_other`; counters only.
"""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from common.errors import LoraplexError
from common.top_labels import FoldedCounters, overflow_counter
from gateway import deadlines
from loraplex.v1 import types_pb2

REQUEST_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 960)
TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2.5)
# Until the first worker has said which model it serves.
UNKNOWN_MODEL = "unknown"

_OUTCOMES = {
    "OK": "ok",
    "CANCELLED": "cancelled",
    "RESOURCE_EXHAUSTED": "shed",
    "DEADLINE_EXCEEDED": "shed",
    "UNAVAILABLE": "server_error",
    "INTERNAL": "server_error",
    "DATA_LOSS": "server_error",
}


# What the adapter label of a request to the base model says.
BASE_MODEL = "_base"

# Where the worker had the adapter when the request was offered to it.
_RESIDENCY = {types_pb2.TIER_PAGES: "pages", types_pb2.TIER_HOST: "host", types_pb2.TIER_STORE: "store"}

# Why a call was turned away, by the code of the error where its reason is none of these.
_REJECTIONS = {
    "QUEUE_FULL": "queue_full",
    "TOO_MANY_REQUESTS": "queue_full",
    "DRAINING": "draining",
    "NO_WORKER": "no_worker",
    "INVALID_ARGUMENT": "invalid",
    "NOT_FOUND": "not_found",
    "FAILED_PRECONDITION": "precondition",
    "ALREADY_EXISTS": "precondition",
    "DEADLINE_EXCEEDED": "deadline",
    "RESOURCE_EXHAUSTED": "quota",
    "UNAUTHENTICATED": "auth",
    "PERMISSION_DENIED": "auth",
    "UNAVAILABLE": "unavailable",
}


@dataclass(slots=True)
class Call:
    """What is known of a call while it is served; None until it is."""

    tenant: str | None = None
    # Empty: the base model.
    adapter_id: str | None = None


class GatewayMetrics:
    """Counters and histograms of the calls, in seconds and tokens."""

    def __init__(self, registry: CollectorRegistry, max_adapter_labels: int = 50, max_tenant_labels: int = 100) -> None:
        def name(suffix: str) -> str:
            return f"loraplex_gateway_{suffix}"

        self.model = UNKNOWN_MODEL
        labels = ("model", "method", "code", "outcome")
        self._requests = Counter(name("requests_total"), "Calls that ended", labels, registry=registry)
        self._inflight = Gauge(name("inflight_requests"), "Calls being served", ("method",), registry=registry)
        self._duration = Histogram(
            name("request_duration_seconds"),
            "From the first byte of a generate call to its end",
            ("model", "outcome"),
            registry=registry,
            buckets=REQUEST_BUCKETS,
        )
        self._first_token = Histogram(
            name("time_to_first_token_seconds"),
            "From the first byte of a generate call to its first token, by where the worker had the adapter",
            ("model", "residency"),
            registry=registry,
            buckets=REQUEST_BUCKETS,
        )
        self._inter_token = Histogram(
            name("inter_token_seconds"),
            "Seconds per token between two deltas of a request",
            ("model",),
            registry=registry,
            buckets=TOKEN_BUCKETS,
        )
        overflow = overflow_counter(registry)
        self._tenants = FoldedCounters("tenant", max_tenant_labels, registry, overflow)
        self._adapters = FoldedCounters("adapter", max_adapter_labels, registry, overflow)
        by_model = ("model",)
        self._prompt = self._tenants.add(name("prompt_tokens_total"), "Prompt tokens submitted", by_model)
        self._generated = self._tenants.add(name("generated_tokens_total"), "Tokens received", by_model)
        self._cached = self._tenants.add(
            name("cached_tokens_total"), "Prompt tokens whose KV came from the prefix cache", by_model
        )
        self._by_tenant = self._tenants.add(name("requests_by_tenant_total"), "Generate calls that ended", ("outcome",))
        self._by_adapter = self._adapters.add(
            name("requests_by_adapter_total"), "Generate calls of a known adapter that ended", ("outcome",)
        )
        self._rejections = Counter(
            name("rejections_total"), "Generate calls turned away, by why", ("reason",), registry=registry
        )
        for reason in sorted(set(_REJECTIONS.values())):
            self._rejections.labels(reason)
        self.quota_fallbacks = Counter(
            name("quota_fallbacks_total"), "Requests checked by this gateway alone: Redis failed", registry=registry
        )
        self.stream_buffer = Gauge(name("stream_buffer_bytes"), "What waits for clients to take it", registry=registry)
        self.duplicates = Counter(
            name("duplicate_tokens_dropped_total"), "Tokens that a worker sent twice", registry=registry
        )
        self.slow_clients = Counter(
            name("slow_client_aborts_total"), "Requests ended because their client did not read", registry=registry
        )
        self.gaps = Counter(name("token_gaps_total"), "Requests failed for missing tokens", registry=registry)

    @contextmanager
    def call(self, method: str, context: Any) -> Iterator[Call]:
        """Counts one call by how it ends, and by what its handler notes in the Call meanwhile."""
        call, generates = Call(), method.startswith("Generate")
        started, code, timeout = time.monotonic(), "OK", context.time_remaining()
        self._inflight.labels(method).inc()
        try:
            yield call
        except BaseException as error:
            code = _code_of(error, context.time_remaining(), timeout)
            if generates and isinstance(error, LoraplexError):
                reason = _REJECTIONS.get(error.reason) or _REJECTIONS.get(code)
                if reason is not None:
                    self._rejections.labels(reason).inc()
            raise
        finally:
            outcome = _OUTCOMES.get(code, "client_error")
            self._inflight.labels(method).dec()
            self._requests.labels(self.model, method, code, outcome).inc()
            if generates:
                self._duration.labels(self.model, outcome).observe(time.monotonic() - started)
                self._count(call, outcome)

    def submitted(self, tenant: str, prompt_tokens: int) -> None:
        self._prompt.labels(self._tenants.fold(tenant), self.model).inc(prompt_tokens)

    def finished(self, tenant: str, cached_tokens: int) -> None:
        """A request has got its usage."""
        self._cached.labels(self._tenants.fold(tenant), self.model).inc(cached_tokens)

    def first_tokens(
        self, tenant: str, num_tokens: int, seconds: float, tier: "types_pb2.Tier.ValueType", *, base: bool
    ) -> None:
        """`seconds` since the start of the call; `tier` is where the worker had the adapter, if there is one."""
        residency = "none" if base else _RESIDENCY.get(tier, "unknown")
        self._generated.labels(self._tenants.fold(tenant), self.model).inc(num_tokens)
        self._first_token.labels(self.model, residency).observe(seconds)

    def more_tokens(self, tenant: str, num_tokens: int, seconds: float) -> None:
        """`seconds` since the tokens before these."""
        self._generated.labels(self._tenants.fold(tenant), self.model).inc(num_tokens)
        self._inter_token.labels(self.model).observe(seconds / num_tokens)

    def _count(self, call: Call, outcome: str) -> None:
        if call.tenant is not None:
            self._by_tenant.labels(self._tenants.fold(call.tenant), outcome).inc()
        if call.adapter_id is not None:
            self._by_adapter.labels(self._adapters.fold(call.adapter_id or BASE_MODEL), outcome).inc()


def _code_of(error: BaseException, remaining_seconds: float | None, timeout_seconds: float | None) -> str:
    if isinstance(error, LoraplexError):
        return error.code.name
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        expired = deadlines.has_passed(remaining_seconds, timeout_seconds)
        return grpc.StatusCode.DEADLINE_EXCEEDED.name if expired else grpc.StatusCode.CANCELLED.name
    return grpc.StatusCode.INTERNAL.name
