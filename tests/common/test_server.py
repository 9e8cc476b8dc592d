"""The life of a service: ports, health, reflection, metrics, the end of a failed start."""

import asyncio
import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from common.channel import connect
from common.config import ServiceConfig
from common.server import Server
from common.version import VERSION
from loraplex.v1 import gateway_pb2, gateway_pb2_grpc
from tests.adapter_store.redis_server import free_port

ROOT = Path(__file__).resolve().parents[2]
GATEWAY = gateway_pb2.DESCRIPTOR.services_by_name["GatewayService"]
TIMEOUT_SECONDS = 100


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    """A started server that is not ready yet."""
    server = Server(ServiceConfig(drain_seconds=0))
    servicer: Any = gateway_pb2_grpc.GatewayServiceServicer
    gateway_pb2_grpc.add_GatewayServiceServicer_to_server(servicer(), server.grpc)
    await server.start([GATEWAY])
    yield server
    await server.stop()


@pytest.fixture
async def channel(server: Server) -> AsyncIterator[grpc.aio.Channel]:
    async with connect(server.address) as channel:
        yield channel


async def health(channel: grpc.aio.Channel, service: str) -> str:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    response = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT_SECONDS)
    name: str = health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)
    return name


async def metrics(server: Server) -> str:
    def get() -> str:
        with urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=TIMEOUT_SECONDS) as response:
            text: str = response.read().decode()
            return text

    return await asyncio.to_thread(get)


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


def run_in_process(serve: str, **options: str) -> "subprocess.CompletedProcess[str]":
    """Runs a service whose `serve` has the given body."""
    program = f"""
from common.config import ServiceConfig
from common.server import Server, announce, run_service, until_signal
async def serve(config):
    {serve}
run_service("scheduler", ServiceConfig, serve)
"""
    flags = [text for name, value in options.items() for text in (f"--{name}", value)]
    return subprocess.run(
        [sys.executable, "-c", program, *flags], cwd=ROOT, capture_output=True, text=True, timeout=100
    )


@pytest.mark.parametrize("service", ["", "readiness", GATEWAY.full_name])
async def test_a_server_is_not_serving_before_it_is_ready(channel: grpc.aio.Channel, service: str) -> None:
    assert await health(channel, service) == "NOT_SERVING"


@pytest.mark.parametrize("service", ["", "readiness", "liveness", GATEWAY.full_name])
async def test_a_ready_server_is_serving(server: Server, channel: grpc.aio.Channel, service: str) -> None:
    await server.set_ready(True)
    assert await health(channel, service) == "SERVING"


async def test_readiness_goes_back(server: Server, channel: grpc.aio.Channel) -> None:
    await server.set_ready(True)
    await server.set_ready(False)
    assert await health(channel, "readiness") == "NOT_SERVING"


async def test_liveness_does_not_wait_for_readiness(channel: grpc.aio.Channel) -> None:
    assert await health(channel, "liveness") == "SERVING"


async def test_a_watch_of_health_hears_of_readiness(server: Server, channel: grpc.aio.Channel) -> None:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    watch = stub.Watch(health_pb2.HealthCheckRequest(service="readiness"), timeout=TIMEOUT_SECONDS)
    before = await watch.read()
    await server.set_ready(True)
    after = await watch.read()
    watch.cancel()
    serving = health_pb2.HealthCheckResponse
    assert [before.status, after.status] == [serving.NOT_SERVING, serving.SERVING]


async def test_the_ready_event_follows_readiness(server: Server) -> None:
    states = [server.ready.is_set()]
    for ready in (True, False):
        await server.set_ready(ready)
        states.append(server.ready.is_set())
    assert states == [False, True, False]


async def test_reflection_lists_the_services(channel: grpc.aio.Channel) -> None:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    requests = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    answers = [answer async for answer in stub.ServerReflectionInfo(requests, timeout=TIMEOUT_SECONDS)]
    names = {service.name for service in answers[0].list_services_response.service}
    assert names >= {GATEWAY.full_name, "grpc.health.v1.Health"}


async def test_the_ready_gauge_follows_readiness(server: Server) -> None:
    before = await metrics(server)
    await server.set_ready(True)
    assert ("loraplex_ready 0.0" in before, "loraplex_ready 1.0" in await metrics(server)) == (True, True)


async def test_metrics_name_the_version(server: Server) -> None:
    assert f'loraplex_build_info{{version="{VERSION}"}} 1.0' in await metrics(server)


def value_of(text: str, series: str) -> float:
    (line,) = [line for line in text.splitlines() if line.startswith(f"{series} ")]
    return float(line.split()[-1])


async def test_the_exposition_says_how_many_series_it_has(server: Server) -> None:
    text = await metrics(server)
    shown = [line for line in text.splitlines() if not line.startswith("#")]
    assert value_of(text, "loraplex_metrics_series") == len(shown)


async def test_calls_are_timed_by_method_and_code(server: Server, channel: grpc.aio.Channel) -> None:
    await health(channel, "liveness")
    with pytest.raises(grpc.aio.AioRpcError):
        await health(channel, "nonsense")
    text = await metrics(server)
    counts = [
        value_of(
            text,
            "rpc_server_call_duration_seconds_count"
            f'{{rpc_method="grpc.health.v1.Health/Check",rpc_response_status_code="{code}"}}',
        )
        for code in ("OK", "NOT_FOUND")
    ]
    assert counts == [1, 1]


async def test_a_method_that_is_not_served_adds_no_series(server: Server, channel: grpc.aio.Channel) -> None:
    unknown: Any = channel.unary_unary("/made.up/Method")
    with pytest.raises(grpc.aio.AioRpcError):
        await unknown(b"", timeout=TIMEOUT_SECONDS)
    assert "made.up" not in await metrics(server)


async def test_a_draining_server_says_so(server: Server) -> None:
    before = value_of(await metrics(server), "loraplex_draining")
    await server.drain()
    assert (before, value_of(await metrics(server), "loraplex_draining")) == (0, 1)


async def test_the_options_are_shown_as_a_hash_only(server: Server) -> None:
    text = await metrics(server)
    assert re.search(r'^loraplex_config_info\{hash="[0-9a-f]{12}"\} 1.0$', text, re.MULTILINE)


async def test_a_taken_port_is_an_error_that_names_the_address(server: Server) -> None:
    with pytest.raises(OSError, match=server.address):
        await Server(ServiceConfig(port=port_of(server.address))).start([])


async def test_a_taken_metrics_port_is_an_error_that_names_the_address(server: Server) -> None:
    with pytest.raises(OSError, match=server.metrics_address):
        await Server(ServiceConfig(metrics_port=port_of(server.metrics_address))).start([])


async def test_a_stopped_server_frees_its_ports() -> None:
    # Nobody else takes them in between.
    config = ServiceConfig(port=free_port(), metrics_port=free_port(), drain_seconds=0)
    for _ in range(2):
        server = Server(config)
        await server.start([])
        await server.stop()
        assert port_of(server.address) == config.port


async def test_a_process_whose_port_is_taken_ends_with_a_line_that_says_so(server: Server) -> None:
    port = str(port_of(server.address))
    process = await asyncio.to_thread(run_in_process, "await Server(config).start([])", port=port)
    assert process.returncode == 1
    # gRPC's own core may write lines before ours.
    assert server.address in json.loads(process.stderr.splitlines()[-1])["message"]


def test_sigterm_ends_a_ready_process_cleanly() -> None:
    process = run_in_process("""
    import asyncio, os, signal
    server = Server(config)
    await server.start([])
    announce("scheduler", grpc=server.address)
    asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGTERM)
    await until_signal()
    await server.stop()
""")
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout.startswith("ready scheduler grpc=127.0.0.1:")
