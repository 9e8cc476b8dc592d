"""Peers that are late, lost, or something else than expected."""

import asyncio
import logging

import grpc
import pytest

from loraplex.v1 import gateway_pb2, scheduler_pb2, types_pb2
from tests.gateway.conftest import Fleet, StartFleet, ask, failure, read_all, reason_of, retry_seconds_of
from tests.gateway.fakes import FakeScheduler, FakeWorker, byte_tokenizer_files, identity, token_ids, tokens


async def test_a_lost_worker_fails_its_streams_with_a_retry_hint(fleet: Fleet) -> None:
    call = fleet.api.GenerateStream(ask())
    key = await fleet.running()
    await fleet.worker.say(tokens(key, 0, token_ids("a")))
    await call.read()
    await fleet.worker.stop()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert (reason_of(caught.value), retry_seconds_of(caught.value)) == ("WORKER_LOST", 1.0)
    assert (await fleet.scheduler.aborted()).key == key


async def test_a_gateway_without_workers_is_not_ready_until_one_is_back(fleet: Fleet) -> None:
    await fleet.worker.hellos.get()
    await fleet.worker.stop()
    await fleet.becomes(ready=False)
    error = await failure(fleet.api.Generate(ask()))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.UNAVAILABLE, "NO_WORKER")
    assert retry_seconds_of(error) == 1.0
    again = FakeWorker()
    again.port = fleet.worker.port
    await again.start()
    await fleet.becomes(ready=True)
    hello = await again.hellos.get()
    assert hello.known_tokenizer_digest == identity().tokenizer_digest
    await again.stop()


async def test_a_request_placed_on_a_worker_nobody_knows_fails_at_once(fleet: Fleet) -> None:
    call = fleet.api.GenerateStream(ask())
    spec = await fleet.scheduler.submitted()
    await fleet.scheduler.place(spec.key, "stranger")
    assert reason_of(await failure(call)) == "WORKER_LOST"


async def test_a_lost_scheduler_stops_no_stream_but_new_requests(fleet: Fleet) -> None:
    call = fleet.api.GenerateStream(ask())
    key = await fleet.running()
    await fleet.worker.say(tokens(key, 0, token_ids("a")))
    await call.read()
    await fleet.scheduler.stop()
    await fleet.becomes(ready=False)
    error = await failure(fleet.api.Generate(ask()))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.UNAVAILABLE, "SCHEDULER_UNAVAILABLE")
    await fleet.worker.say(tokens(key, 1, token_ids("b"), finish=True))
    answer = await call.read()
    assert isinstance(answer, gateway_pb2.GenerateResponse)
    assert answer.outputs[0].text == "b"


async def test_what_was_not_placed_is_submitted_to_the_next_scheduler(start_fleet: StartFleet) -> None:
    fleet = await start_fleet()
    placed = fleet.api.GenerateStream(ask("placed"))
    placed_key = await fleet.running()
    await fleet.worker.say(tokens(placed_key, 0, token_ids("a")))
    await placed.read()
    waiting = fleet.api.GenerateStream(ask("waiting"), timeout=60)
    first = await fleet.scheduler.submitted()
    await fleet.restart_scheduler()
    second = await fleet.scheduler.submitted()
    assert second.key == first.key
    assert second.remaining_seconds < first.remaining_seconds
    await fleet.scheduler.place(second.key)
    await fleet.worker.say(tokens(second.key, 0, token_ids("ok"), finish=True))
    assert len(await read_all(waiting)) == 1
    placed.cancel()


async def test_a_scheduler_that_starts_anew_and_lists_nobody_stops_no_stream(fleet: Fleet) -> None:
    call = fleet.api.GenerateStream(ask())
    key = await fleet.running()
    await fleet.worker.say(tokens(key, 0, token_ids("a")))
    await call.read()
    await fleet.restart_scheduler(workers=[])
    await fleet.worker.say(tokens(key, 1, token_ids("b"), finish=True))
    assert isinstance(await call.read(), gateway_pb2.GenerateResponse)
    assert await call.read() is grpc.aio.EOF


async def test_a_scheduler_of_an_older_epoch_is_refused(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    """One that slept while another took over may still be there when the gateway dials again."""
    await fleet.scheduler.stop()
    port = fleet.scheduler.port
    fleet.scheduler = FakeScheduler(epoch=2)
    fleet.scheduler.port = port
    fleet.scheduler.workers.append(fleet.worker.info)
    await fleet.scheduler.start()
    await fleet.becomes(ready=True)
    await fleet.scheduler.stop()
    await fleet.becomes(ready=False)
    fleet.scheduler = FakeScheduler(epoch=1)
    fleet.scheduler.port = port
    await fleet.scheduler.start()
    refusal = "its epoch is 1; a scheduler of epoch 2 has taken over from it"
    while refusal not in caplog.text:  # noqa: ASYNC110  # no event tells
        await asyncio.sleep(0.01)
    assert not fleet.gateway.server.ready.is_set()


async def test_what_was_not_placed_fails_when_the_scheduler_stays_away(start_fleet: StartFleet) -> None:
    fleet = await start_fleet(scheduler_grace_seconds=0.05)
    call = fleet.api.GenerateStream(ask())
    await fleet.scheduler.submitted()
    await fleet.scheduler.stop()
    error = await failure(call)
    assert (reason_of(error), retry_seconds_of(error)) == ("SCHEDULER_UNAVAILABLE", 1.0)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(identity(protocol_version=99), id="protocol version"),
        pytest.param(identity(base_fingerprint="other"), id="base fingerprint"),
        pytest.param(identity(tokenizer_digest="other"), id="tokenizer digest"),
        pytest.param(identity(geometry=types_pb2.ModelGeometry(num_heads=9)), id="geometry"),
    ],
)
async def test_a_worker_that_serves_something_else_is_refused(
    fleet: Fleet, model: types_pb2.ModelIdentity, caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> None:
    other = FakeWorker("w1")
    other.model = model
    await other.start()
    fleet.scheduler.workers.append(other.info)
    with caplog.at_level(logging.ERROR, "gateway.link"):
        await fleet.scheduler.list_workers()
        await other.hellos.get()
        call = fleet.api.GenerateStream(ask())
        spec = await fleet.scheduler.submitted()
        await fleet.scheduler.place(spec.key, "w1")
        assert reason_of(await failure(call)) == "WORKER_LOST"
    what = request.node.callspec.id
    assert any(f"its {what} is" in record.message for record in caplog.records)
    await other.stop()


async def test_a_second_worker_of_the_same_model_needs_to_send_no_tokenizer(fleet: Fleet) -> None:
    other = FakeWorker("w1")
    await other.start()
    fleet.scheduler.workers.append(other.info)
    await fleet.scheduler.list_workers()
    assert (await other.hellos.get()).known_tokenizer_digest == identity().tokenizer_digest
    call = fleet.api.GenerateStream(ask())
    spec = await fleet.scheduler.submitted()
    await fleet.scheduler.place(spec.key, "w1")
    await other.say(tokens(spec.key, 0, token_ids("ok"), finish=True))
    assert len(await read_all(call)) == 1
    await other.stop()


async def test_a_worker_that_moved_outlives_its_old_address(fleet: Fleet) -> None:
    moved = FakeWorker()
    await moved.start()
    fleet.scheduler.workers = [moved.info]
    await fleet.scheduler.list_workers()
    await moved.hellos.get()
    call = fleet.api.GenerateStream(ask())
    key = await fleet.running()
    await moved.say(tokens(key, 0, token_ids("a")))
    await call.read()
    await fleet.worker.stop()
    await moved.say(tokens(key, 1, token_ids("b"), finish=True))
    assert isinstance(await call.read(), gateway_pb2.GenerateResponse)
    await moved.stop()


async def test_a_gateway_whose_workers_drain_is_not_ready(fleet: Fleet) -> None:
    fleet.scheduler.workers[0].state = scheduler_pb2.WORKER_STATE_DRAINING
    await fleet.scheduler.list_workers()
    await fleet.becomes(ready=False)


async def test_the_operators_tokenizer_is_used(
    start_fleet: StartFleet, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("tokenizer")
    for name, content in byte_tokenizer_files().items():
        (folder / name).write_bytes(content)
    fleet = await start_fleet(tokenizer=folder)
    assert (await fleet.worker.hellos.get()).known_tokenizer_digest == identity().tokenizer_digest


async def test_a_worker_with_another_tokenizer_than_the_operators_is_refused(
    start_fleet: StartFleet, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.json").write_bytes(byte_tokenizer_files()["tokenizer.json"] + b"\n")
    fleet = await start_fleet(wait=False, tokenizer=folder)
    # It is dialled again, which a welcome worker never is.
    await fleet.worker.hellos.get()
    await fleet.worker.hellos.get()
    assert not fleet.gateway.server.ready.is_set()


async def test_a_stopped_gateway_leaves_no_task(start_fleet: StartFleet) -> None:
    before = asyncio.all_tasks()
    fleet = await start_fleet()
    call = fleet.api.GenerateStream(ask())
    await fleet.running()
    await fleet.gateway.stop()
    assert (await failure(call)).code() is grpc.StatusCode.UNAVAILABLE
    own = {task.get_name(): task.get_coro() for task in asyncio.all_tasks() - before}
    assert [name for name, coro in own.items() if "gateway" in getattr(coro, "__module__", "")] == []
