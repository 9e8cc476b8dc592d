"""Counts and times every call of a server, by method and status code; OpenTelemetry's name and labels.

`rpc_server_call_duration_seconds` follows the semantic conventions for RPC: the method is one this server has, never a
client's string. A stream is counted when it ends.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
from prometheus_client import CollectorRegistry, Histogram

from common.interceptors import KINDS

CALL_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0, 300.0)
_CODES = {code.value[0]: code.name for code in grpc.StatusCode}


class CallInterceptor(grpc.aio.ServerInterceptor):
    """The outermost interceptor: it sees the status that the caller gets."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._seconds = Histogram(
            "rpc_server_call_duration_seconds",
            "Calls that ended, by method and status code",
            ("rpc_method", "rpc_response_status_code"),
            registry=registry,
            buckets=CALL_BUCKETS,
        )

    async def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return handler
        kind = KINDS[bool(handler.request_streaming), bool(handler.response_streaming)]
        wrap = self._stream if handler.response_streaming else self._unary
        counted: grpc.RpcMethodHandler[Any, Any] = getattr(grpc, f"{kind}_rpc_method_handler")(
            wrap(getattr(handler, kind), handler_call_details.method.lstrip("/")),
            handler.request_deserializer,
            handler.response_serializer,
        )
        return counted

    def _unary(self, inner: Any, method: str) -> Any:
        async def call(request: Any, context: Any) -> Any:
            started = time.monotonic()
            try:
                response = await inner(request, context)
            except BaseException as error:
                self._ended(method, started, _code_of(error, context))
                raise
            self._ended(method, started, "OK")
            return response

        return call

    def _stream(self, inner: Any, method: str) -> Any:
        async def call(request: Any, context: Any) -> AsyncIterator[Any]:
            started = time.monotonic()
            try:
                async with aclosing(inner(request, context)) as responses:
                    async for response in responses:
                        yield response
            except BaseException as error:
                self._ended(method, started, _code_of(error, context))
                raise
            self._ended(method, started, "OK")

        return call

    def _ended(self, method: str, started: float, code: str) -> None:
        self._seconds.labels(method, code).observe(time.monotonic() - started)


def _code_of(error: BaseException, context: Any) -> str:
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return grpc.StatusCode.CANCELLED.name
    code = context.code()
    number = code.value[0] if isinstance(code, grpc.StatusCode) else code
    return _CODES.get(number or grpc.StatusCode.UNKNOWN.value[0], grpc.StatusCode.UNKNOWN.name)
