"""Roles in certificates: the table against the protos, and every call of every role against a real server."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common.channel import connect
from common.config import ServiceConfig
from common.errors import from_rpc_error
from common.roles import GATEWAY, OPERATOR, ROLE_URI, ROLES, WORKER, callers, roles_in
from common.server import Server
from common.tls import PemFiles
from gateway.config import GatewayConfig
from loraplex.v1 import (
    adapter_store_pb2,
    adapter_store_pb2_grpc,
    gateway_pb2,
    memory_pb2,
    memory_pb2_grpc,
    scheduler_pb2,
    scheduler_pb2_grpc,
    worker_pb2,
    worker_pb2_grpc,
)
from tests.certificates import LOOPBACK, Authority, authority

TIMEOUT_SECONDS = 60
SERVICES: dict[str, Any] = {
    "SchedulerService": scheduler_pb2,
    "WorkerService": worker_pb2,
    "MemoryService": memory_pb2,
    "AdapterStoreService": adapter_store_pb2,
}
METHODS = [
    (f"/loraplex.v1.{service}/{method.name}", method)
    for service, module in SERVICES.items()
    for method in module.DESCRIPTOR.services_by_name[service].methods
]


def test_every_call_of_a_service_inside_is_for_somebody() -> None:
    assert len(METHODS) == 20
    assert [name for name, _ in METHODS if not callers(name)] == []
    assert {role for name, _ in METHODS for role in callers(name) or ()} == set(ROLES)


def test_a_new_call_is_for_nobody_until_the_table_says_for_whom() -> None:
    assert callers("/loraplex.v1.SchedulerService/Reset") == ()
    assert callers("/loraplex.v1.ResetService/Reset") == ()
    assert (
        callers(
            f"/loraplex.v1.GatewayService/{gateway_pb2.DESCRIPTOR.services_by_name['GatewayService'].methods[0].name}"
        )
        == ()
    )


def test_what_is_not_ours_is_for_all() -> None:
    assert callers("/grpc.health.v1.Health/Check") is None


@pytest.mark.parametrize(
    ("uri", "roles"),
    [
        (b"loraplex://role/gateway", {"gateway"}),
        (b"loraplex://role/", {""}),
        (b"xloraplex://role/gateway", set()),
        (b"gateway", set()),
        (b"LORAPLEX://role/gateway", set()),
    ],
)
def test_a_role_is_the_end_of_one_kind_of_name(uri: bytes, roles: set[str]) -> None:
    assert roles_in([uri, b"spiffe://elsewhere/gateway"]) == roles


def test_the_gateway_asks_its_clients_for_no_role() -> None:
    files: dict[str, Any] = dict.fromkeys(("tls_cert", "tls_key", "tls_ca"), "file")
    with pytest.raises(ValueError, match="tls_roles is for the services behind the gateway"):
        GatewayConfig(scheduler="s:1", adapter_store="a:1", tls_require_client=True, tls_roles=True, **files)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return authority(tmp_path_factory.mktemp("roles"))


def shown(ours: Authority, role: str) -> PemFiles:
    pair = ours.issue(role, f"{LOOPBACK},URI:{ROLE_URI}{role}")
    return PemFiles(pair.cert, pair.key, ours.cert)


class Everything:
    """Answers every call of every kind with an empty message."""

    def __getattr__(self, name: str) -> Any:
        method = {method.name: method for _, method in METHODS}[name]
        response = method.output_type._concrete_class

        async def answer(request: Any, context: Any) -> Any:
            return response()

        async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
            yield response()

        return stream if method.server_streaming else answer


async def serve(ours: Authority, stack: AsyncExitStack, *, roles: bool) -> Server:
    pair = ours.issue("server")
    options: dict[str, Any] = {
        "tls_cert": pair.cert,
        "tls_key": pair.key,
        "tls_ca": ours.cert,
        "tls_require_client": True,
    }
    server = Server(ServiceConfig(drain_seconds=0, tls_roles=roles, **options))
    servicer: Any = Everything()
    scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(servicer, server.grpc)
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(servicer, server.grpc)
    memory_pb2_grpc.add_MemoryServiceServicer_to_server(servicer, server.grpc)
    adapter_store_pb2_grpc.add_AdapterStoreServiceServicer_to_server(servicer, server.grpc)
    await server.start([])
    stack.push_async_callback(server.stop)
    return server


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


async def answered(channel: grpc.aio.Channel, name: str, method: Any) -> bool:
    """Whether the caller was let in; what else than an answer or a missing role comes is raised."""
    kind = "stream" if method.client_streaming else "unary"
    kind += "_stream" if method.server_streaming else "_unary"
    response = method.output_type._concrete_class
    make = getattr(channel, kind)
    call = make(name, method.input_type._concrete_class.SerializeToString, response.FromString)
    request = iter(()) if method.client_streaming else method.input_type._concrete_class()
    try:
        if method.server_streaming:
            return [one async for one in call(request, timeout=TIMEOUT_SECONDS)] == [response()]
        return bool(await call(request, timeout=TIMEOUT_SECONDS) == response())
    except grpc.aio.AioRpcError as error:
        if from_rpc_error(error, peer="server").reason != "ROLE_MISSING":
            raise
        return False


EXPECTED: dict[str, set[str]] = {
    GATEWAY: {
        "Connect",
        "Attach",
        "UploadAdapter",
        "GetAdapter",
        "ListAdapters",
        "DeleteAdapter",
        "SetAlias",
        "ExportAdapter",
        "WatchAdapters",
    },
    WORKER: {"Register", "FetchWeights"},
    OPERATOR: {
        "GetState",
        "Explain",
        "GetUsage",
        "ListResident",
        "Pin",
        "Unpin",
        "PrefetchAdapter",
        "Evict",
        "WatchResidency",
        "UploadAdapter",
        "GetAdapter",
        "ListAdapters",
        "DeleteAdapter",
        "SetAlias",
        "ExportAdapter",
        "WatchAdapters",
    },
    "guest": set(),
}


@pytest.mark.parametrize("role", EXPECTED)
async def test_each_role_is_let_into_its_calls_and_no_others(ours: Authority, stack: AsyncExitStack, role: str) -> None:
    server = await serve(ours, stack, roles=True)
    channel = await stack.enter_async_context(connect(server.address, tls=shown(ours, role)))
    let_in = {name.rpartition("/")[2] for name, method in METHODS if await answered(channel, name, method)}
    assert let_in == EXPECTED[role]


async def test_without_the_option_a_certificate_of_the_authority_is_enough(
    ours: Authority, stack: AsyncExitStack
) -> None:
    server = await serve(ours, stack, roles=False)
    channel = await stack.enter_async_context(connect(server.address, tls=shown(ours, "guest")))
    assert [name for name, method in METHODS if not await answered(channel, name, method)] == []


async def test_a_name_of_another_kind_is_no_role(ours: Authority, stack: AsyncExitStack) -> None:
    """DNS:gateway in a certificate that some authority gives to whoever has that name."""
    server = await serve(ours, stack, roles=True)
    pair = ours.issue("host", f"{LOOPBACK},DNS:gateway,email:loraplex@role.gateway")
    tls = PemFiles(pair.cert, pair.key, ours.cert)
    channel = await stack.enter_async_context(connect(server.address, tls=tls))
    (name, method) = METHODS[0]
    assert not await answered(channel, name, method)


async def test_health_is_for_every_certificate(ours: Authority, stack: AsyncExitStack) -> None:
    server = await serve(ours, stack, roles=True)
    channel = await stack.enter_async_context(connect(server.address, tls=shown(ours, "guest")))
    stub: Any = health_pb2_grpc.HealthStub(channel)
    response = await stub.Check(health_pb2.HealthCheckRequest(service="liveness"), timeout=TIMEOUT_SECONDS)
    assert response.status == health_pb2.HealthCheckResponse.SERVING


async def test_the_refusal_says_for_whom_the_call_is(ours: Authority, stack: AsyncExitStack) -> None:
    server = await serve(ours, stack, roles=True)
    channel = await stack.enter_async_context(connect(server.address, tls=shown(ours, WORKER)))
    stub: Any = memory_pb2_grpc.MemoryServiceStub(channel)
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await stub.Evict(memory_pb2.EvictRequest(), timeout=TIMEOUT_SECONDS)
    sentence = "/loraplex.v1.MemoryService/Evict is for the roles operator; the caller's certificate has worker"
    assert refusal.value.details() == sentence
