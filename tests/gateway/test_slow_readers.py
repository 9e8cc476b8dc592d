"""Clients that do not read: bounded in memory and in time, and a burden to nobody else."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest
from prometheus_client import generate_latest

from loraplex.v1 import gateway_pb2_grpc, scheduler_pb2, types_pb2
from tests.gateway.conftest import Fleet, StartFleet, ask, failure, read_all, reason_of
from tests.gateway.fakes import token_ids, tokens

# Far more than the window of the stream takes.
MANY_TOKENS = 1_000_000
STEP_TOKENS = 20_000
# The window of a stream stays as it is; else it grows to megabytes on one machine.
NARROW = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 64 * 1024), ("grpc.use_local_subchannel_pool", 1)]


Unread = Callable[[Fleet], Awaitable[tuple[Any, types_pb2.RequestKey]]]


def slow_aborts(fleet: Fleet) -> float:
    shown = generate_latest(fleet.gateway.server.registry).decode()
    (line,) = [line for line in shown.splitlines() if line.startswith("loraplex_gateway_slow_client_aborts_total ")]
    return float(line.split()[1])


@pytest.fixture
async def unread() -> AsyncIterator[Unread]:
    """Starts a call whose client reads nothing while more comes than the transport takes; returns it and its key."""
    channels: list[grpc.aio.Channel] = []

    async def start(fleet: Fleet) -> tuple[Any, types_pb2.RequestKey]:
        channels.append(grpc.aio.insecure_channel(fleet.gateway.server.address, options=NARROW))
        output = types_pb2.OutputParams(return_token_ids=True)
        call = gateway_pb2_grpc.GatewayServiceStub(channels[-1]).GenerateStream(ask(output=output))
        key = await fleet.running()
        for offset in range(0, MANY_TOKENS, STEP_TOKENS):
            await fleet.worker.say(tokens(key, offset, [100] * STEP_TOKENS))
        return call, key

    yield start
    for channel in channels:
        await channel.close()


async def test_a_client_that_stalls_is_cut_off_everywhere(start_fleet: StartFleet, unread: Unread) -> None:
    fleet = await start_fleet(write_stall_seconds=0.1, max_buffered_bytes=2**30)
    call, key = await unread(fleet)
    for abort in (await fleet.worker.aborts.get(), await fleet.scheduler.aborted()):
        assert (abort.key, abort.cause) == (key, scheduler_pb2.ABORT_CAUSE_SLOW_READER)
    assert len(fleet.gateway.table) == 0
    assert slow_aborts(fleet) == 1
    error = await failure(call)
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "SLOW_READER")


async def test_a_client_that_leaves_more_than_its_buffer_is_cut_off_at_once(
    start_fleet: StartFleet, unread: Unread
) -> None:
    fleet = await start_fleet(write_stall_seconds=1000.0, max_buffered_bytes=100_000)
    call, key = await unread(fleet)
    abort = await fleet.worker.aborts.get()
    assert (abort.key, abort.cause) == (key, scheduler_pb2.ABORT_CAUSE_SLOW_READER)
    assert reason_of(await failure(call)) == "SLOW_READER"
    assert slow_aborts(fleet) == 1


async def test_what_a_cut_off_client_then_reads_is_the_beginning(start_fleet: StartFleet, unread: Unread) -> None:
    # Long enough that the first messages get through.
    fleet = await start_fleet(write_stall_seconds=2.0)
    call, _ = await unread(fleet)
    await fleet.worker.aborts.get()
    offsets, received = [], [0]
    with contextlib.suppress(grpc.aio.AioRpcError):
        async for response in call:
            offsets.append(response.outputs[0].token_offset)
            received.append(received[-1] + len(response.outputs[0].token_ids))
    assert offsets == received[:-1]
    assert 0 < received[-1] < MANY_TOKENS


@pytest.mark.parametrize(
    ("stall_seconds", "cause"),
    [
        pytest.param(0.1, scheduler_pb2.ABORT_CAUSE_SLOW_READER, id="cut off"),
        pytest.param(1000.0, scheduler_pb2.ABORT_CAUSE_CANCELLED, id="not yet"),
    ],
)
async def test_a_client_that_leaves_without_reading_is_no_error(
    start_fleet: StartFleet,
    unread: Unread,
    caplog: pytest.LogCaptureFixture,
    stall_seconds: float,
    cause: "scheduler_pb2.AbortCause.ValueType",
) -> None:
    fleet = await start_fleet(write_stall_seconds=stall_seconds, max_buffered_bytes=2**30)
    call, _ = await unread(fleet)
    aborting = asyncio.ensure_future(fleet.worker.aborts.get())
    if cause == scheduler_pb2.ABORT_CAUSE_SLOW_READER:
        await asyncio.wait([aborting])
    call.cancel()
    assert (await aborting).cause == cause
    await fleet.gateway.server.grpc.stop(5.0)
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []
    shown = generate_latest(fleet.gateway.server.registry).decode()
    code = "RESOURCE_EXHAUSTED" if cause == scheduler_pb2.ABORT_CAUSE_SLOW_READER else "CANCELLED"
    assert f'requests_total{{code="{code}",method="GenerateStream"' in shown


async def test_a_client_that_stalls_slows_nobody(fleet: Fleet, unread: Unread) -> None:
    stalled, _ = await unread(fleet)
    for _ in range(10):
        call = fleet.api.GenerateStream(ask())
        key = await fleet.running()
        await fleet.worker.say(tokens(key, 0, token_ids("ok"), finish=True))
        assert len(await read_all(call)) == 1
    stalled.cancel()


async def test_a_message_larger_than_the_transport_takes_is_refused(start_fleet: StartFleet) -> None:
    fleet = await start_fleet(max_message_bytes=1000)
    for method in (fleet.api.Generate, fleet.api.GenerateStream):
        call = method(ask())
        key = await fleet.running()
        await fleet.worker.say(tokens(key, 0, token_ids("x" * 2000), finish=True))
        error = await failure(call)
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "ANSWER_TOO_LARGE")


async def test_log_probabilities_of_a_prompt_that_no_message_takes_are_refused_before_any_work(
    start_fleet: StartFleet,
) -> None:
    fleet = await start_fleet(max_message_bytes=1000)
    error = await failure(fleet.api.Generate(ask("x" * 10, output=types_pb2.OutputParams(prompt_logprobs=20))))
    assert reason_of(error) == "ANSWER_TOO_LARGE"
    assert "at least 2772 bytes and may have 1000" in (error.details() or "")
    assert fleet.scheduler.received.empty()
