"""A real gRPC server whose handlers the tests of `common` write."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest

from common.interceptors import ErrorInterceptor
from loraplex.v1 import adapter_store_pb2_grpc, gateway_pb2_grpc

# The stubs call these abstract; at run time a method that is not overridden answers UNIMPLEMENTED.
_Gateway: Any = gateway_pb2_grpc.GatewayServiceServicer
_Store: Any = adapter_store_pb2_grpc.AdapterStoreServiceServicer

StartServer = Callable[..., Awaitable[grpc.aio.Channel]]


@pytest.fixture
async def start_server() -> AsyncIterator[StartServer]:
    """Starts a server behind the interceptor and returns a channel to it.

    Keyword arguments are handlers by the name of their rpc, of the gateway's or of the adapter store's service.
    """
    started: list[tuple[grpc.aio.Server, grpc.aio.Channel]] = []

    async def start(**handlers: Any) -> grpc.aio.Channel:
        server = grpc.aio.server(interceptors=[ErrorInterceptor()])
        gateway, store = _Gateway(), _Store()
        for name, handler in handlers.items():
            setattr(gateway if hasattr(gateway, name) else store, name, handler)
        gateway_pb2_grpc.add_GatewayServiceServicer_to_server(gateway, server)
        adapter_store_pb2_grpc.add_AdapterStoreServiceServicer_to_server(store, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        started.append((server, channel))
        return channel

    yield start
    for server, channel in started:
        await channel.close()
        await server.stop(None)
