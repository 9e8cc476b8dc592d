"""The life of a service process: start, ready, serve until a signal, drain, stop."""

import asyncio
import logging
import signal
from collections.abc import Callable, Coroutine, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

import grpc
import uvloop
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry

from common.call_metrics import CallInterceptor
from common.config import ServiceConfig, parse
from common.interceptors import ErrorInterceptor
from common.logs import set_up_logs
from common.metrics import LifeMetrics, certificate_gauge, new_registry, serve_metrics
from common.roles import RoleInterceptor
from common.tls import RenewedPem, server_credentials

_log = logging.getLogger(__name__)
_Config = TypeVar("_Config", bound=ServiceConfig)

# Without ping_timeout_ms a frozen peer is noticed after 60 s whatever the other two say.
KEEPALIVE_OPTIONS: list[tuple[str, int]] = [
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
]

_SERVER_OPTIONS: list[tuple[str, int]] = [
    *KEEPALIVE_OPTIONS,
    # The default lets a second process bind the same port and take half of the traffic.
    ("grpc.so_reuseport", 0),
    # There is no "recv" in this name; with it the option is silently ignored.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
]


class Server:
    """A gRPC server with health, reflection and metrics.

    Health answers for `""`, `liveness` (this loop turns) and `readiness` (takes work), and for each service by name.
    """

    def __init__(self, config: ServiceConfig, *, max_message_bytes: int = 4 * 1024 * 1024) -> None:
        """Raises OSError and ValueError where the files of a certificate cannot be used."""
        self._config = config
        files = config.server_files
        self._pem = None if files is None else RenewedPem(files)
        options = [
            *_SERVER_OPTIONS,
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", max_message_bytes),
        ]
        self.registry: CollectorRegistry = new_registry()
        self._life = LifeMetrics(self.registry, config)
        if self._pem is not None:
            self._pem.follow(certificate_gauge(self.registry).set)
        self._lag: asyncio.Task[None] | None = None
        interceptors = [CallInterceptor(self.registry), ErrorInterceptor()]
        if config.tls_roles:
            interceptors.append(RoleInterceptor())
        self.grpc = grpc.aio.server(interceptors=interceptors, options=options)
        self._health = health_aio.HealthServicer()
        self._probes: grpc.aio.Server | None = None
        self._services: list[str] = []
        self.ready = asyncio.Event()

    async def start(self, descriptors: Sequence[Any]) -> None:
        """Listens; not ready yet. `descriptors` are the service descriptors already added to `self.grpc`.

        Raises OSError naming the address when a port is taken.
        """
        self._services = [descriptor.full_name for descriptor in descriptors]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)
        names = [*self._services, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME]
        reflection.enable_server_reflection(names, self.grpc)
        credentials = None
        if self._pem is not None:
            credentials = server_credentials(self._pem, require_client=self._config.tls_require_client)
        self.address = _listen(self.grpc, self._config.host, self._config.port, credentials)
        if self._config.health_port is not None:
            self._probes = grpc.aio.server(interceptors=[ErrorInterceptor()], options=_SERVER_OPTIONS)
            health_pb2_grpc.add_HealthServicer_to_server(self._health, self._probes)
            self.health_address = _listen(self._probes, self._config.host, self._config.health_port, None)
        try:
            self._metrics = serve_metrics(self.registry, self._config.host, self._config.metrics_port)
        except OSError as error:
            wanted = f"{self._config.host}:{self._config.metrics_port}"
            raise OSError(f"cannot serve metrics on {wanted}: {error.strerror}") from error
        self.metrics_address = f"{self._config.host}:{self._metrics.port}"
        self._lag = asyncio.create_task(self._life.watch_lag())
        await self._health.set("liveness", health_pb2.HealthCheckResponse.SERVING)
        await self.set_ready(False)
        if self._probes is not None:
            await self._probes.start()
        await self.grpc.start()

    async def set_ready(self, ready: bool, *, standby: bool = False) -> None:
        """Flips readiness in health and in the `loraplex_ready` gauge.

        A standby is ready to take over and serves nothing: clients that ask for a service by name pass it by.
        """
        status = {True: health_pb2.HealthCheckResponse.SERVING, False: health_pb2.HealthCheckResponse.NOT_SERVING}
        await self._health.set("readiness", status[ready])
        for name in ("", *self._services):
            await self._health.set(name, status[ready and not standby])
        self._life.ready.set(int(ready))
        if ready:
            self.ready.set()
        else:
            self.ready.clear()

    async def drain(self) -> None:
        """Not ready any more, and said to be draining; calls go on."""
        self._life.draining.set(1)
        await self.set_ready(False)

    async def stop(self) -> None:
        """Stops taking calls, gives those in flight the drain time, closes."""
        await self.drain()
        await self.grpc.stop(self._config.drain_seconds)
        if self._probes is not None:
            await self._probes.stop(None)
        if self._lag is not None:
            self._lag.cancel()
            await asyncio.gather(self._lag, return_exceptions=True)
        self._metrics.stop()


def _listen(server: grpc.aio.Server, host: str, port: int, credentials: grpc.ServerCredentials | None) -> str:
    """The address. Raises OSError naming it when the port is taken."""
    address = f"{host}:{port}"
    try:
        if credentials is None:
            bound = server.add_insecure_port(address)
        else:
            bound = server.add_secure_port(address, credentials)
    except RuntimeError:
        bound = 0
    if bound == 0:
        raise OSError(f"cannot listen on {address}: is another process using the port?")
    return f"{host}:{bound}"


def announce(service: str, **addresses: str) -> None:
    """Prints the one line on standard output that says where a ready process is: `ready scheduler grpc=HOST:PORT`."""
    print("ready", service, *(f"{name}={address}" for name, address in addresses.items()), flush=True)


_stop_requested: ContextVar[asyncio.Event | None] = ContextVar("stop_requested", default=None)


def _watch_signals() -> asyncio.Event:
    """The first SIGTERM or SIGINT sets the event; a second one ends the process at once."""
    loop, stopped = asyncio.get_running_loop(), asyncio.Event()

    def stop() -> None:
        stopped.set()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    return stopped


async def until_signal() -> None:
    """Returns once SIGTERM or SIGINT has come, be it before this call: whoever sees us ready may stop us at once."""
    await (_stop_requested.get() or _watch_signals()).wait()


def run_service(name: str, config_class: type[_Config], serve: Callable[[_Config], Coroutine[Any, Any, None]]) -> None:
    """Entry point of a service: parse options, set up logs, run `serve` on one event loop.

    An OSError or ValueError during start (a port taken, a file missing) becomes one line and exit code 1.
    """
    config = parse(config_class, f"python -m {name}")
    set_up_logs(name, config.log_level)
    try:
        uvloop.run(_serve(serve, config))
    except (OSError, ValueError) as error:
        _log.error("cannot start: %s", error)
        raise SystemExit(1) from None


async def _serve(serve: Callable[[_Config], Coroutine[Any, Any, None]], config: _Config) -> None:
    _stop_requested.set(_watch_signals())
    await serve(config)
