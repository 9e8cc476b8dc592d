"""`/metrics` on its own port, rendered in its own thread."""

import asyncio
import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from wsgiref.simple_server import WSGIServer

from prometheus_client import (
    CollectorRegistry,
    Gauge,
    GCCollector,
    Histogram,
    Info,
    Metric,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    start_http_server,
)
from prometheus_client.core import GaugeMetricFamily

from common import version

# One `_created` series beside each counter and histogram: half of the exposition, and nobody asks for them.
disable_created_metrics()  # type: ignore[no-untyped-call]  # the library has no annotation there

LAG_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_LAG_INTERVAL_SECONDS = 0.25


@dataclass(frozen=True)
class MetricsServer:
    """A running exposition endpoint and the registry it shows."""

    registry: CollectorRegistry
    port: int
    _server: WSGIServer
    _thread: threading.Thread

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class CountingRegistry(CollectorRegistry):
    """Says with each exposition how many series it holds."""

    def collect(self) -> Iterator[Metric]:
        # This one counts too.
        series = 1
        for metric in super().collect():
            series += len(metric.samples)
            yield metric
        yield GaugeMetricFamily("loraplex_metrics_series", "Series that this process exposes", value=series)


def new_registry() -> CollectorRegistry:
    """A registry with the process's own figures and the build's version."""
    registry = CountingRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    Info("loraplex_build", "Version of this process", registry=registry).info({"version": version.VERSION})
    return registry


class LifeMetrics:
    """What every service says of its own life."""

    def __init__(self, registry: CollectorRegistry, config: object) -> None:
        """`config` is the options; only their hash is shown, so that two processes can be compared."""
        self.ready = Gauge("loraplex_ready", "1 while this process takes work", registry=registry)
        self.draining = Gauge("loraplex_draining", "1 once this process finishes what it has", registry=registry)
        self._lag = Histogram(
            "loraplex_event_loop_lag_seconds",
            "How late the event loop runs what is due",
            buckets=LAG_BUCKETS,
            registry=registry,
        )
        info = Info("loraplex_config", "Hash of the options of this process", registry=registry)
        info.info({"hash": hashlib.sha256(repr(config).encode()).hexdigest()[:12]})

    async def watch_lag(self) -> None:
        """Observes the event loop four times a second. Runs until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _LAG_INTERVAL_SECONDS
            await asyncio.sleep(_LAG_INTERVAL_SECONDS)
            self._lag.observe(max(0.0, loop.time() - due))


def certificate_gauge(registry: CollectorRegistry) -> Gauge:
    """Only where the gRPC port speaks TLS."""
    name = "loraplex_tls_certificate_expiry_timestamp_seconds"
    return Gauge(name, "When the certificate that is shown, or its authority, ends", registry=registry)


def serve_metrics(registry: CollectorRegistry, host: str, port: int) -> MetricsServer:
    """Starts the endpoint. Raises OSError when the port is taken."""
    server, thread = start_http_server(port, addr=host, registry=registry)
    return MetricsServer(registry, server.server_port, server, thread)
