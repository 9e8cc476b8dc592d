"""`/metrics` on its own port, rendered in its own thread."""

import threading
from dataclasses import dataclass
from wsgiref.simple_server import WSGIServer

from prometheus_client import (
    CollectorRegistry,
    Gauge,
    GCCollector,
    Info,
    PlatformCollector,
    ProcessCollector,
    start_http_server,
)

from common import version


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


def new_registry() -> CollectorRegistry:
    """A registry with the process's own figures and the build's version."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    Info("loraplex_build", "Version of this process", registry=registry).info({"version": version.VERSION})
    return registry


def ready_gauge(registry: CollectorRegistry) -> Gauge:
    return Gauge("loraplex_ready", "1 while this process takes work", registry=registry)


def serve_metrics(registry: CollectorRegistry, host: str, port: int) -> MetricsServer:
    """Starts the endpoint. Raises OSError when the port is taken."""
    server, thread = start_http_server(port, addr=host, registry=registry)
    return MetricsServer(registry, server.server_port, server, thread)
