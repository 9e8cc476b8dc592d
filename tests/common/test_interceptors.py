"""Request ids in, opaque errors out, on a real server."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from common.errors import NotFound, ResourceExhausted
from common.interceptors import MAX_REQUEST_ID_CHARACTERS
from common.logs import request_id_var
from loraplex.v1 import adapter_store_pb2, adapter_store_pb2_grpc, gateway_pb2, gateway_pb2_grpc
from tests.common.conftest import StartServer

SECRET = "secret path /srv/keys"
GENERATE = "/loraplex.v1.GatewayService/Generate"
UPLOAD = "/loraplex.v1.AdapterStoreService/UploadAdapter"
NOT_PROTOBUF = b"\xff\xff\xff"

# Long enough for two busy cores, short enough to see a call that hangs.
TIMEOUT_SECONDS = 20


async def answer_request_id(request: Any, context: Any) -> gateway_pb2.GenerateResponse:
    return gateway_pb2.GenerateResponse(request_id=request_id_var.get())


async def fail(request: Any, context: Any) -> gateway_pb2.GenerateResponse:
    raise ValueError(SECRET)


async def fail_in_the_middle(request: Any, context: Any) -> AsyncIterator[gateway_pb2.GenerateResponse]:
    yield gateway_pb2.GenerateResponse()
    raise ValueError(SECRET)


async def leak_a_cancellation(request: Any, context: Any) -> gateway_pb2.GenerateResponse:
    task = asyncio.create_task(asyncio.Event().wait())
    asyncio.get_running_loop().call_soon(task.cancel)
    await task
    return gateway_pb2.GenerateResponse()


async def leak_a_cancellation_in_a_stream(request: Any, context: Any) -> AsyncIterator[gateway_pb2.GenerateResponse]:
    yield await leak_a_cancellation(request, context)


async def read_all(requests: AsyncIterator[Any], context: Any) -> adapter_store_pb2.UploadAdapterResponse:
    async for _ in requests:
        pass
    return adapter_store_pb2.UploadAdapterResponse()


async def generate(channel: grpc.aio.Channel, **options: Any) -> gateway_pb2.GenerateResponse:
    request = gateway_pb2.GenerateRequest(text="hello")
    stub = gateway_pb2_grpc.GatewayServiceStub(channel)
    response: gateway_pb2.GenerateResponse = await stub.Generate(request, timeout=TIMEOUT_SECONDS, **options)
    return response


async def stream(channel: grpc.aio.Channel) -> list[gateway_pb2.GenerateResponse]:
    stub: Any = gateway_pb2_grpc.GatewayServiceStub(channel)
    call = stub.GenerateStream(gateway_pb2.GenerateRequest(text="hello"), timeout=TIMEOUT_SECONDS)
    return [response async for response in call]


def raw(channel: grpc.aio.Channel) -> Any:
    """The channel without types: it sends bytes as they are."""
    return channel


def error_info(error: grpc.aio.AioRpcError) -> error_details_pb2.ErrorInfo:
    trailers: Any = dict(error.trailing_metadata())
    status, info = status_pb2.Status.FromString(trailers["grpc-status-details-bin"]), error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    return info


async def test_the_text_of_an_exception_never_escapes_a_unary_call(start_server: StartServer) -> None:
    channel = await start_server(Generate=fail)
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await generate(channel, metadata=[("x-request-id", "r-7")])
    assert failure.value.code() is grpc.StatusCode.INTERNAL
    assert failure.value.details() == "internal error; quote request id r-7"
    assert SECRET not in str(failure.value.trailing_metadata())


async def test_the_text_of_an_exception_never_escapes_a_stream(start_server: StartServer) -> None:
    channel = await start_server(GenerateStream=fail_in_the_middle)
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await stream(channel)
    assert failure.value.code() is grpc.StatusCode.INTERNAL
    assert SECRET not in f"{failure.value.details()}{failure.value.trailing_metadata()}"


async def test_an_unexpected_exception_is_logged_with_its_traceback(
    start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    channel = await start_server(Generate=fail)
    with caplog.at_level(logging.ERROR), pytest.raises(grpc.aio.AioRpcError):
        await generate(channel)
    assert [str(record.exc_info[1]) for record in caplog.records if record.exc_info] == [SECRET]


async def test_an_error_of_ours_arrives_with_code_message_and_reason(start_server: StartServer) -> None:
    async def refuse(request: Any, context: Any) -> gateway_pb2.GenerateResponse:
        raise ResourceExhausted("QUEUE_FULL", "8 of 8 places are taken", retry_after_seconds=0.5)

    channel = await start_server(Generate=refuse)
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await generate(channel)
    assert failure.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert failure.value.details() == "8 of 8 places are taken"
    assert error_info(failure.value).reason == "QUEUE_FULL"


async def test_a_malformed_request_is_an_invalid_argument(start_server: StartServer) -> None:
    channel = await start_server(Generate=answer_request_id)
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await raw(channel).unary_unary(GENERATE)(NOT_PROTOBUF, timeout=TIMEOUT_SECONDS)
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error_info(failure.value).reason == "MALFORMED_REQUEST"


async def test_a_malformed_message_in_a_stream_is_an_invalid_argument(start_server: StartServer) -> None:
    channel = await start_server(UploadAdapter=read_all)
    valid = adapter_store_pb2.UploadAdapterRequest().SerializeToString()
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await raw(channel).stream_unary(UPLOAD)(iter([valid, NOT_PROTOBUF]), timeout=TIMEOUT_SECONDS)
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_valid_stream_of_requests_passes(start_server: StartServer) -> None:
    channel = await start_server(UploadAdapter=read_all)
    stub = adapter_store_pb2_grpc.AdapterStoreServiceStub(channel)
    requests = [adapter_store_pb2.UploadAdapterRequest()] * 3
    response = await stub.UploadAdapter(iter(requests), timeout=TIMEOUT_SECONDS)
    assert response == adapter_store_pb2.UploadAdapterResponse()


async def test_a_cancellation_leaked_by_an_inner_task_ends_the_call(start_server: StartServer) -> None:
    channel = await start_server(Generate=leak_a_cancellation)
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await generate(channel)
    assert failure.value.code() is grpc.StatusCode.INTERNAL


async def test_a_cancellation_leaked_in_a_stream_ends_the_stream(start_server: StartServer) -> None:
    channel = await start_server(GenerateStream=leak_a_cancellation_in_a_stream)
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await stream(channel)
    assert failure.value.code() is grpc.StatusCode.INTERNAL


async def test_a_client_that_cancels_cancels_the_handler(
    start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    entered, cancelled = asyncio.Event(), asyncio.Event()

    async def wait(request: Any, context: Any) -> gateway_pb2.GenerateResponse:
        entered.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return gateway_pb2.GenerateResponse()

    channel = await start_server(Generate=wait)
    call: Any = gateway_pb2_grpc.GatewayServiceStub(channel).Generate(gateway_pb2.GenerateRequest())
    await asyncio.wait_for(entered.wait(), TIMEOUT_SECONDS)
    call.cancel()
    await asyncio.wait_for(cancelled.wait(), TIMEOUT_SECONDS)
    assert not caplog.records


async def test_a_client_that_leaves_a_stream_closes_the_handler(start_server: StartServer) -> None:
    closed = asyncio.Event()

    async def wait(request: Any, context: Any) -> AsyncIterator[gateway_pb2.GenerateResponse]:
        try:
            yield gateway_pb2.GenerateResponse()
            await asyncio.Event().wait()
        finally:
            closed.set()

    channel = await start_server(GenerateStream=wait)
    call: Any = gateway_pb2_grpc.GatewayServiceStub(channel).GenerateStream(gateway_pb2.GenerateRequest())
    await call.read()
    call.cancel()
    await asyncio.wait_for(closed.wait(), TIMEOUT_SECONDS)


async def test_a_client_that_is_still_sending_sees_why_it_is_refused(start_server: StartServer) -> None:
    async def refuse(requests: AsyncIterator[Any], context: Any) -> adapter_store_pb2.UploadAdapterResponse:
        raise NotFound("ADAPTER_NOT_FOUND", "refused at the first message")

    channel = await start_server(UploadAdapter=refuse)
    chunk = adapter_store_pb2.UploadChunk(data=bytes(1024 * 1024))
    requests = [adapter_store_pb2.UploadAdapterRequest(chunk=chunk)] * 32
    upload: Any = adapter_store_pb2_grpc.AdapterStoreServiceStub(channel).UploadAdapter(iter(requests))
    with pytest.raises(grpc.aio.AioRpcError, match="refused at the first message") as failure:
        await asyncio.wait_for(upload, TIMEOUT_SECONDS)
    assert failure.value.code() is grpc.StatusCode.NOT_FOUND


async def test_abort_by_the_handler_keeps_its_status(start_server: StartServer) -> None:
    async def abort(request: Any, context: Any) -> None:
        await context.abort(grpc.StatusCode.OUT_OF_RANGE, "as the handler said")

    channel = await start_server(Generate=abort)
    with pytest.raises(grpc.aio.AioRpcError, match="as the handler said") as failure:
        await generate(channel)
    assert failure.value.code() is grpc.StatusCode.OUT_OF_RANGE


async def test_an_unknown_method_stays_unimplemented(start_server: StartServer) -> None:
    channel = await start_server()
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await raw(channel).unary_unary("/loraplex.v1.GatewayService/Nothing")(b"", timeout=TIMEOUT_SECONDS)
    assert failure.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_the_callers_request_id_is_used(start_server: StartServer) -> None:
    channel = await start_server(Generate=answer_request_id)
    longest = "r" * MAX_REQUEST_ID_CHARACTERS
    assert (await generate(channel, metadata=[("x-request-id", longest)])).request_id == longest


@pytest.mark.parametrize("given", ["r" * (MAX_REQUEST_ID_CHARACTERS + 1), ""], ids=["too long", "empty"])
async def test_an_unusable_request_id_is_replaced(start_server: StartServer, given: str) -> None:
    channel = await start_server(Generate=answer_request_id)
    request_id = (await generate(channel, metadata=[("x-request-id", given)])).request_id
    assert len(request_id) == 32
    assert request_id != given


async def test_each_call_without_an_id_gets_its_own(start_server: StartServer) -> None:
    channel = await start_server(Generate=answer_request_id)
    assert (await generate(channel)).request_id != (await generate(channel)).request_id
