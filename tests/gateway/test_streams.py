"""The way of a request through a real gateway between fake peers."""

import asyncio

import grpc
import pytest

from adapter_store.config import StoreConfig
from gateway.config import GatewayConfig
from loraplex.v1 import gateway_pb2, scheduler_pb2, types_pb2
from tests.gateway.conftest import Fleet, StartFleet, ask, failure, read_all, reason_of, retry_seconds_of
from tests.gateway.fakes import VERSION, token_ids, tokens

USAGE = types_pb2.Usage(prompt_tokens=3, completion_tokens=3, queue_seconds=0.5)


def text_of(responses: list[gateway_pb2.GenerateResponse]) -> str:
    return "".join(output.text for response in responses for output in response.outputs)


async def test_a_request_reaches_the_scheduler_complete(fleet: Fleet) -> None:
    call = fleet.api.GenerateStream(ask("hi", adapter_id="alpha"), timeout=100)
    spec = await fleet.scheduler.submitted()
    assert spec.key.tenant == spec.isolation_salt == "default"
    assert spec.key.request_id
    assert spec.gateway_id == (await fleet.worker.hellos.get()).gateway_id
    assert (spec.adapter_id, spec.adapter_version, spec.adapter_bytes) == ("alpha", VERSION, 4096)
    assert spec.prompt_token_ids == [1, *token_ids("hi")]
    assert (spec.sampling.temperature, spec.stopping.max_tokens, spec.output.n) == (1.0, 61, 1)
    assert spec.sampling.HasField("seed")
    assert not spec.whole
    # The transport rounds a deadline up.
    assert 90 < spec.remaining_seconds < 105
    call.cancel()


async def test_the_scheduler_is_told_that_a_client_waits_for_the_whole_answer(fleet: Fleet) -> None:
    call = fleet.api.Generate(ask())
    assert (await fleet.scheduler.submitted()).whole
    call.cancel()


async def test_deltas_come_in_order_and_the_ends_carry_the_facts(fleet: Fleet) -> None:
    call = fleet.api.GenerateStream(ask(adapter_id="alpha"), metadata=[("x-request-id", "mine")])
    key = await fleet.running()
    await fleet.worker.say(tokens(key, 0, token_ids("ab")))
    first = await call.read()
    assert isinstance(first, gateway_pb2.GenerateResponse)
    assert (first.request_id, first.adapter_version) == ("mine", VERSION)
    assert first.seed > 0
    assert not first.HasField("usage")
    await fleet.worker.say(tokens(key, 2, token_ids("c"), finish=True, usage=USAGE))
    last = await call.read()
    assert isinstance(last, gateway_pb2.GenerateResponse)
    assert (last.outputs[0].text, last.outputs[0].token_offset) == ("c", 2)
    assert last.outputs[0].finish.reason == types_pb2.FINISH_REASON_LENGTH
    assert last.usage == USAGE
    assert await call.read() is grpc.aio.EOF
    assert len(fleet.gateway.table) == 0


async def test_steps_that_a_reader_has_not_waited_for_come_together(fleet: Fleet) -> None:
    call = fleet.api.GenerateStream(ask())
    key = await fleet.running()
    step = [tokens(key, position, token_ids("x")) for position in range(50)]
    await fleet.worker.say(*step, tokens(key, 50, [], finish=True))
    responses = await read_all(call)
    assert text_of(responses) == "x" * 50
    assert len(responses) == 1


async def test_unary_is_the_stream_in_one_message(fleet: Fleet) -> None:
    request = ask(sampling=types_pb2.SamplingParams(seed=7), output=types_pb2.OutputParams(return_token_ids=True))
    ids = token_ids("a😀b")
    call = asyncio.ensure_future(fleet.api.Generate(request, metadata=[("x-request-id", "mine")]))
    key = await fleet.running()
    for position, token in enumerate(ids):
        await fleet.worker.say(tokens(key, position, [token], finish=position == len(ids) - 1))
    whole = await call
    assert (whole.request_id, whole.seed, whole.usage.completion_tokens) == ("mine", 7, len(ids))
    (output,) = whole.outputs
    assert (output.text, list(output.token_ids), output.token_offset) == ("a😀b", ids, 0)
    assert output.finish.reason == types_pb2.FINISH_REASON_LENGTH


async def test_a_seed_is_drawn_anew_for_each_request(fleet: Fleet) -> None:
    calls = [fleet.api.GenerateStream(ask()) for _ in range(2)]
    seeds = {(await fleet.scheduler.submitted()).sampling.seed for _ in calls}
    assert len(seeds) == 2
    for call in calls:
        call.cancel()


async def test_a_request_without_a_deadline_says_none(fleet: Fleet) -> None:
    call = fleet.api.GenerateStream(ask())
    assert not (await fleet.scheduler.submitted()).HasField("remaining_seconds")
    call.cancel()


async def test_a_stop_token_is_named(fleet: Fleet) -> None:
    call = fleet.api.GenerateStream(ask())
    key = await fleet.running()
    stop = types_pb2.FINISH_REASON_STOP
    await fleet.worker.say(tokens(key, 0, [5], finish=True, finish_reason=stop, matched_stop_token_id=5))
    (response,) = await read_all(call)
    assert response.outputs[0].finish == gateway_pb2.Finish(reason=stop, stop_token_id=5)


async def test_duplicate_tokens_are_dropped(fleet: Fleet) -> None:
    call = fleet.api.GenerateStream(ask())
    key = await fleet.running()
    await fleet.worker.say(tokens(key, 0, token_ids("ab")))
    await fleet.worker.say(tokens(key, 0, token_ids("ab")), tokens(key, 1, token_ids("bc"), finish=True))
    assert text_of(await read_all(call)) == "abc"


async def test_a_gap_is_internal_and_frees_the_worker(fleet: Fleet) -> None:
    call = fleet.api.GenerateStream(ask(), metadata=[("x-request-id", "mine")])
    key = await fleet.running()
    await fleet.worker.say(tokens(key, 0, token_ids("a")), tokens(key, 2, token_ids("c")))
    error = await failure(call)
    assert error.code() is grpc.StatusCode.INTERNAL
    assert error.details() == "internal error; quote request id mine"
    assert (await fleet.worker.aborts.get()).key == key
    assert (await fleet.scheduler.aborted()).key == key


async def test_a_refusal_is_the_calls_status(fleet: Fleet) -> None:
    call = fleet.api.GenerateStream(ask())
    spec = await fleet.scheduler.submitted()
    await fleet.scheduler.refuse(spec.key, types_pb2.RequestError(code=8, reason="QUEUE_FULL", message="8 of 8 wait"))
    error = await failure(call)
    assert (error.code(), error.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "8 of 8 wait")
    assert reason_of(error) == "QUEUE_FULL"


async def test_an_error_of_the_worker_is_the_calls_status(fleet: Fleet) -> None:
    call = fleet.api.Generate(ask())
    key = await fleet.running()
    refusal = types_pb2.RequestError(code=9, reason="BASE_MODEL_MISMATCH", message="shapes differ")
    await fleet.worker.say(tokens(key, 0, [], finish_reason=types_pb2.FINISH_REASON_ERROR, error=refusal))
    error = await failure(call)
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.FAILED_PRECONDITION, "BASE_MODEL_MISMATCH")


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_a_cancelled_call_is_aborted_everywhere(fleet: Fleet, method: str) -> None:
    call = getattr(fleet.api, method)(ask())
    key = await fleet.running()
    await fleet.worker.say(tokens(key, 0, token_ids("a")))
    call.cancel()
    for abort in (await fleet.worker.aborts.get(), await fleet.scheduler.aborted()):
        assert (abort.key, abort.cause) == (key, scheduler_pb2.ABORT_CAUSE_CANCELLED)
    assert len(fleet.gateway.table) == 0


async def test_a_call_cancelled_before_it_is_placed_is_aborted_at_the_scheduler(fleet: Fleet) -> None:
    call = fleet.api.GenerateStream(ask())
    spec = await fleet.scheduler.submitted()
    call.cancel()
    assert (await fleet.scheduler.aborted()).key == spec.key


async def test_a_call_that_nobody_reads_is_aborted_when_it_is_cancelled(fleet: Fleet) -> None:
    call = fleet.api.GenerateStream(ask(output=types_pb2.OutputParams(return_token_ids=True)))
    key = await fleet.running()
    # More than the transport buffers, so that the gateway waits in the middle of sending.
    for position in range(0, 400_000, 4000):
        await fleet.worker.say(tokens(key, position, [100] * 4000))
    call.cancel()
    assert (await fleet.worker.aborts.get()).key == key


async def test_a_passed_deadline_is_aborted_everywhere(fleet: Fleet) -> None:
    call = fleet.api.GenerateStream(ask(), timeout=4)
    key = await fleet.running()
    assert (await failure(call)).code() is grpc.StatusCode.DEADLINE_EXCEEDED
    for abort in (await fleet.worker.aborts.get(), await fleet.scheduler.aborted()):
        assert (abort.key, abort.cause) == (key, scheduler_pb2.ABORT_CAUSE_DEADLINE)


async def test_a_deadline_that_passes_in_the_queue_is_aborted_at_the_scheduler(fleet: Fleet) -> None:
    call = fleet.api.Generate(ask(), timeout=4)
    spec = await fleet.scheduler.submitted()
    assert (await failure(call)).code() is grpc.StatusCode.DEADLINE_EXCEEDED
    abort = await fleet.scheduler.aborted()
    assert (abort.key, abort.cause) == (spec.key, scheduler_pb2.ABORT_CAUSE_DEADLINE)


async def test_no_call_outlives_the_longest_that_is_allowed(start_fleet: StartFleet) -> None:
    """So that the bytes of an adapter that was deleted, which stay a while, outlive every request for it."""
    fleet = await start_fleet(max_request_seconds=2.0)
    call = fleet.api.GenerateStream(ask())
    spec = await fleet.scheduler.submitted()
    error = await failure(call)
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")
    assert "2 s" in (error.details() or "")
    abort = await fleet.scheduler.aborted()
    assert (abort.key, abort.cause) == (spec.key, scheduler_pb2.ABORT_CAUSE_DEADLINE)


def test_what_was_deleted_stays_longer_than_any_call() -> None:
    assert StoreConfig.delete_grace_seconds > GatewayConfig.max_request_seconds


async def test_an_id_in_flight_is_refused(fleet: Fleet) -> None:
    first = fleet.api.GenerateStream(ask(), metadata=[("x-request-id", "mine")])
    key = await fleet.running()
    error = await failure(fleet.api.GenerateStream(ask(), metadata=[("x-request-id", "mine")]))
    assert error.code() is grpc.StatusCode.ALREADY_EXISTS
    await fleet.worker.say(tokens(key, 0, token_ids("ok"), finish=True))
    assert text_of(await read_all(first)) == "ok"


async def test_more_requests_than_the_limit_are_refused(start_fleet: StartFleet) -> None:
    fleet = await start_fleet(max_inflight_requests=1)
    call = fleet.api.GenerateStream(ask())
    await fleet.scheduler.submitted()
    error = await failure(fleet.api.Generate(ask()))
    assert (error.code(), retry_seconds_of(error)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, 1.0)
    call.cancel()


async def test_no_headers_are_sent_before_the_first_token(fleet: Fleet) -> None:
    call = fleet.api.GenerateStream(ask())
    headers = asyncio.ensure_future(call.initial_metadata())
    key = await fleet.running()
    # An answer to another call proves that there was time to send them.
    await fleet.api.ListModels(gateway_pb2.ListModelsRequest())
    assert not headers.done()
    await fleet.worker.say(tokens(key, 0, token_ids("a")))
    await headers
    call.cancel()


async def test_many_streams_share_a_batch(fleet: Fleet) -> None:
    calls = {f"r{i}": fleet.api.GenerateStream(ask(), metadata=[("x-request-id", f"r{i}")]) for i in range(20)}
    keys = [await fleet.running() for _ in calls]
    await fleet.worker.say(*(tokens(key, 0, token_ids(key.request_id), finish=True) for key in keys))
    for request_id, call in calls.items():
        assert text_of(await read_all(call)) == request_id
