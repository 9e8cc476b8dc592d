"""The outermost layer of every server: request ids in, opaque errors out.

No text of an unexpected exception reaches a caller, a request that does not parse is INVALID_ARGUMENT, and a
`CancelledError` that leaks from an inner task ends the call instead of hanging it. A client that is still sending when
it is refused is heard out for a while, so that it sees the status.
"""

import asyncio
import inspect
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError
from grpc_status import rpc_status

from common.errors import Internal, InvalidArgument, LoraplexError, to_status
from common.logs import request_id_var

REQUEST_ID_KEY = "x-request-id"
MAX_REQUEST_ID_CHARACTERS = 128
# How long a client whose stream is refused may go on sending before it is cut off.
READ_ON_SECONDS = 5.0

_log = logging.getLogger(__name__)

# (request streams, response streams) -> the name grpc gives such a method.
KINDS = {
    (False, False): "unary_unary",
    (False, True): "unary_stream",
    (True, False): "stream_unary",
    (True, True): "stream_stream",
}


class _Malformed:
    """Takes the place of a request that is not a valid protobuf message."""


_MALFORMED = _Malformed()


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every handler of a server."""

    async def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return handler
        method = handler_call_details.method
        request_id = _request_id(handler_call_details)
        deserializer = _forgiving(handler.request_deserializer)
        kind = KINDS[bool(handler.request_streaming), bool(handler.response_streaming)]
        guard = _guard_stream if handler.response_streaming else _guard_unary
        inner = getattr(handler, kind)
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        guarded: grpc.RpcMethodHandler[Any, Any] = make(
            guard(inner, method, request_id), deserializer, handler.response_serializer
        )
        return guarded


def _request_id(details: grpc.HandlerCallDetails) -> str:
    """The caller's id when it is a short printable string, else a new one."""
    for key, value in details.invocation_metadata or ():
        if key == REQUEST_ID_KEY and isinstance(value, str) and _usable(value):
            return value
    return uuid.uuid4().hex


def _usable(request_id: str) -> bool:
    return request_id.isprintable() and 0 < len(request_id) <= MAX_REQUEST_ID_CHARACTERS


def _forgiving(deserializer: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
    def parse(data: bytes) -> Any:
        if deserializer is None:
            return data
        try:
            return deserializer(data)
        except DecodeError:
            return _MALFORMED

    return parse


def _check(request: Any) -> Any:
    if request is _MALFORMED:
        raise InvalidArgument("MALFORMED_REQUEST", "the request is not a valid protobuf message of this method")
    return request


async def _checked(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _check(request)


def _prepared(request: Any) -> Any:
    return _checked(request) if hasattr(request, "__aiter__") else _check(request)


def _guard_unary(inner: Any, method: str, request_id: str) -> Any:
    async def call(request: Any, context: Any) -> Any:
        request_id_var.set(request_id)
        try:
            return await inner(_prepared(request), context)
        except BaseException as error:
            if isinstance(error, Exception):
                await _read_on(request)
            await _abort(error, method, request_id, context)

    return call


def _guard_stream(inner: Any, method: str, request_id: str) -> Any:
    async def call(request: Any, context: Any) -> AsyncIterator[Any]:
        request_id_var.set(request_id)
        try:
            responses = inner(_prepared(request), context)
            if inspect.isawaitable(responses):
                # A handler of the other style: it writes to the context itself.
                await responses
                return
            # Closed here and now: a generator left to the garbage collector runs its `finally` some time later.
            async with aclosing(responses):
                async for response in responses:
                    yield response
        except BaseException as error:
            await _abort(error, method, request_id, context)

    return call


async def _read_on(request: Any) -> None:
    """Takes what a refused client is still sending: one whose message cannot be sent may not see the status."""
    if hasattr(request, "__aiter__"):
        with suppress(TimeoutError, grpc.RpcError, grpc.aio.UsageError):
            async with asyncio.timeout(READ_ON_SECONDS):
                async for _ in request:
                    pass


async def _abort(error: BaseException, method: str, request_id: str, context: Any) -> NoReturn:
    """Ends the call with the status of `error`."""
    if isinstance(error, grpc.aio.AbortError | GeneratorExit | KeyboardInterrupt | SystemExit):
        raise error
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        if context.cancelled() or (task is not None and task.cancelling()):
            raise error
    if not isinstance(error, LoraplexError):
        _log.error("unexpected failure in %s", method, exc_info=error)
        error = Internal("INTERNAL", f"internal error; quote request id {request_id}")
    try:
        await context.abort_with_status(rpc_status.to_status(to_status(error)))
    except grpc.aio.InternalError:
        # The client left while its status waited behind messages that it did not read.
        raise asyncio.CancelledError from None
    raise AssertionError("abort returns only by raising")
