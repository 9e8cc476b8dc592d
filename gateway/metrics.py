"""The gateway's figures. Labels hold the base model's name and values fixed in code, never a client's string."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from common.errors import LoraplexError
from gateway import deadlines

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


class GatewayMetrics:
    """Counters and histograms of the calls, in seconds and tokens."""

    def __init__(self, registry: CollectorRegistry) -> None:
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
            "From the first byte of a generate call to its first token",
            ("model",),
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
        tokens = ("model", "tenant")
        self._prompt = Counter(name("prompt_tokens_total"), "Prompt tokens submitted", tokens, registry=registry)
        self._generated = Counter(name("generated_tokens_total"), "Tokens received", tokens, registry=registry)
        self.duplicates = Counter(
            name("duplicate_tokens_dropped_total"), "Tokens that a worker sent twice", registry=registry
        )
        self.slow_clients = Counter(
            name("slow_client_aborts_total"), "Requests ended because their client did not read", registry=registry
        )
        self.gaps = Counter(name("token_gaps_total"), "Requests failed for missing tokens", registry=registry)

    @contextmanager
    def call(self, method: str, context: Any) -> Iterator[None]:
        """Counts one call by how it ends."""
        started, code, timeout = time.monotonic(), "OK", context.time_remaining()
        self._inflight.labels(method).inc()
        try:
            yield
        except BaseException as error:
            code = _code_of(error, context.time_remaining(), timeout)
            raise
        finally:
            outcome = _OUTCOMES.get(code, "client_error")
            self._inflight.labels(method).dec()
            self._requests.labels(self.model, method, code, outcome).inc()
            if method.startswith("Generate"):
                self._duration.labels(self.model, outcome).observe(time.monotonic() - started)

    def submitted(self, tenant: str, prompt_tokens: int) -> None:
        self._prompt.labels(self.model, tenant).inc(prompt_tokens)

    def tokens(self, tenant: str, num_tokens: int, seconds: float, *, first: bool) -> None:
        """`seconds` since the tokens before these, or since the start of the call."""
        self._generated.labels(self.model, tenant).inc(num_tokens)
        if first:
            self._first_token.labels(self.model).observe(seconds)
        else:
            self._inter_token.labels(self.model).observe(seconds / num_tokens)


def _code_of(error: BaseException, remaining_seconds: float | None, timeout_seconds: float | None) -> str:
    if isinstance(error, LoraplexError):
        return error.code.name
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        expired = deadlines.has_passed(remaining_seconds, timeout_seconds)
        return grpc.StatusCode.DEADLINE_EXCEEDED.name if expired else grpc.StatusCode.CANCELLED.name
    return grpc.StatusCode.INTERNAL.name
