"""The service over a real socket, between fake gateways and workers."""

import asyncio
import logging
import urllib.request
from typing import Any

import grpc
import pytest

from loraplex.v1 import scheduler_pb2, types_pb2
from tests.scheduler.conftest import Cell, StartCell
from tests.scheduler.fakes import FakeGateway, FakeWorker, make_key, make_model, make_spec

RUNNING = scheduler_pb2.REQUEST_STATE_RUNNING


async def state(cell: Cell) -> scheduler_pb2.GetStateResponse:
    return await cell.api.GetState(scheduler_pb2.GetStateRequest())


async def explain(cell: Cell, request_id: str) -> str:
    response = await cell.api.Explain(scheduler_pb2.ExplainRequest(request_id=request_id))
    return " ".join(response.sentences)


async def until(cell: Cell, **wanted: int) -> scheduler_pb2.GetStateResponse:
    """Asks for the state until these fields have these values."""
    while True:
        current = await state(cell)
        if all(getattr(current, name) == value for name, value in wanted.items()):
            return current


async def until_worker(cell: Cell, **wanted: int) -> scheduler_pb2.WorkerSnapshot:
    """Asks for the state until the first worker has these values."""
    while True:
        workers = (await state(cell)).workers
        if workers and all(getattr(workers[0], name) == value for name, value in wanted.items()):
            return workers[0]


async def test_a_request_is_offered_placed_and_forgotten_when_it_has_finished(cell: Cell) -> None:
    worker, gateway = await cell.worker(), await cell.gateway()
    await gateway.submit(make_spec("r", "a", remaining_seconds=1000.0, gateway_id="someone else"))

    offer = await worker.offer()
    assert offer.request.key == make_key("r")
    assert offer.request.gateway_id == "g"
    assert list(offer.request.prompt_token_ids) == list(range(8))
    assert 900.0 < offer.request.remaining_seconds <= 1000.0
    assert await gateway.placed() == ("r", "w0")

    await worker.report(("r", RUNNING))
    snapshot = await until_worker(cell, running_requests=1)
    assert (snapshot.applied_seq, snapshot.offered_requests) == (1, 0)
    await worker.finish("r")
    await until_worker(cell, running_requests=0)
    assert "Attempt 0 of request r finished on worker w0" in await explain(cell, "r")


async def test_a_gateway_learns_of_workers_that_come_drain_and_go(cell: Cell) -> None:
    gateway = await cell.gateway()
    assert gateway.workers == {}
    worker = await cell.worker()
    await gateway.worker_list()
    assert gateway.workers["w0"].address == "w0:1"
    assert gateway.workers["w0"].model.name == "tiny"
    await worker.report(state=scheduler_pb2.WORKER_STATE_DRAINING)
    await gateway.worker_list()
    assert gateway.workers["w0"].state == scheduler_pb2.WORKER_STATE_DRAINING
    worker.hang_up()
    await gateway.worker_list()
    assert gateway.workers == {}


async def test_a_request_that_can_never_fit_is_refused_with_the_numbers(cell: Cell) -> None:
    await cell.worker(num_pages=4)
    gateway = await cell.gateway()
    await gateway.submit(make_spec("r", "a"))
    error = await gateway.refused()
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION.value[0], "REQUEST_TOO_LARGE")
    assert "needs 4 pages for 16 tokens of context and 2 for its adapter; the largest pool has 4" in error.message
    assert not error.HasField("retry_after_seconds")


async def test_without_a_worker_requests_fail_after_the_grace_with_a_hint(start_cell: StartCell) -> None:
    cell = await start_cell(worker_grace_seconds=0.05, retry_after_seconds=3.0)
    gateway = await cell.gateway()
    await gateway.submit(make_spec("r"))
    error = await gateway.refused()
    assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE.value[0], "NO_WORKER")
    assert error.retry_after_seconds == 3.0


async def test_a_deadline_that_passes_in_the_queue_is_told(cell: Cell) -> None:
    gateway = await cell.gateway()
    await gateway.submit(make_spec("r", remaining_seconds=0.02))
    error = await gateway.refused()
    assert (error.code, error.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED.value[0], "DEADLINE_EXCEEDED")


async def test_an_abort_reaches_the_worker_once(cell: Cell) -> None:
    worker, gateway = await cell.worker(), await cell.gateway()
    await gateway.submit(make_spec("r"))
    await worker.offer()
    await gateway.abort(make_key("r"), scheduler_pb2.ABORT_CAUSE_DEADLINE)
    await gateway.abort(make_key("r"))
    await gateway.abort(make_key("unknown"))
    command = await worker.command()
    assert (command.abort.key, command.abort.cause) == (make_key("r"), scheduler_pb2.ABORT_CAUSE_DEADLINE)
    await gateway.submit(make_spec("s"))
    assert (await worker.offer()).request.key == make_key("s")


async def test_a_queued_request_is_explained_and_leaves_the_queue_when_it_is_aborted(cell: Cell) -> None:
    worker, gateway = await cell.worker(num_pages=8), await cell.gateway()
    await gateway.submit(make_spec("first", max_tokens=24))
    await gateway.submit(make_spec("second", max_tokens=16))
    await until(cell, queued_requests=1)
    await worker.offer()
    assert "was offered to worker w0 as command 1; the worker has confirmed 0" in await explain(cell, "first")
    text = await explain(cell, "second")
    assert "position 1 of 1" in text
    assert "Worker w0 cannot take it now: its requests would need" in text
    await gateway.abort(make_key("second"))
    await until(cell, queued_requests=0)


async def test_the_sequences_of_a_lost_gateway_are_aborted(start_cell: StartCell) -> None:
    cell = await start_cell(gateway_grace_seconds=0.05)
    worker, gateway = await cell.worker(), await cell.gateway()
    await gateway.submit(make_spec("r"))
    await worker.offer()
    gateway.hang_up()
    assert (await worker.command()).abort.key == make_key("r")


async def test_a_gateway_that_is_soon_back_keeps_its_sequences(start_cell: StartCell) -> None:
    cell = await start_cell(gateway_grace_seconds=1000.0)
    worker, gateway = await cell.worker(), await cell.gateway()
    await gateway.submit(make_spec("r"))
    await worker.offer()
    gateway.hang_up()
    await until(cell, gateways=0)
    back = await cell.gateway()
    await back.submit(make_spec("r"))
    assert await back.placed() == ("r", "w0")
    await back.submit(make_spec("s"))
    assert (await worker.offer()).request.key == make_key("s")


async def test_what_a_lost_worker_had_is_not_offered_again(cell: Cell) -> None:
    """Its gateway sees the worker's stream break and submits the next attempt."""
    worker, gateway = await cell.worker(), await cell.gateway()
    await gateway.submit(make_spec("r"))
    await worker.offer()
    await worker.report(("r", RUNNING))
    await until_worker(cell, running_requests=1)
    worker.hang_up()
    while gateway.workers:
        await gateway.worker_list()
    other = await cell.worker("w1")
    await gateway.submit(make_spec("r", attempt=1))
    assert (await other.offer()).request.key == make_key("r", 1)
    await gateway.abort(make_key("r", 0))
    await gateway.submit(make_spec("s"))
    assert (await other.offer()).request.key == make_key("s")


async def test_a_new_scheduler_counts_sequences_in_flight_and_does_not_offer_them_again(cell: Cell) -> None:
    running = scheduler_pb2.RequestProgress(key=make_key("old"), state=RUNNING, computed_tokens=100)
    gateway = await cell.gateway()
    worker = await cell.worker(in_flight=[running])
    await gateway.submit(make_spec("old"))
    assert await gateway.placed() == ("old", "w0")
    await gateway.submit(make_spec("new", max_tokens=100))
    await until(cell, queued_requests=1)
    assert "would need" in await explain(cell, "new")
    await worker.finish("old")
    assert (await worker.offer()).request.key == make_key("new")


async def test_a_new_scheduler_listens_to_the_workers_before_it_places(start_cell: StartCell) -> None:
    cell = await start_cell(recovery_seconds=5.0)
    gateway = await cell.gateway()
    await gateway.submit(make_spec("r"))
    await cell.worker("w0")
    running = scheduler_pb2.RequestProgress(key=make_key("r"), state=RUNNING)
    await cell.worker("w1", in_flight=[running])
    assert await gateway.placed() == ("r", "w1")
    assert [worker.running_requests for worker in (await state(cell)).workers] == [0, 1]


async def test_the_epoch_grows_with_every_start_and_every_registration(start_cell: StartCell) -> None:
    old = await start_cell()
    first, again = await old.worker(), await old.worker("w1")
    new = await start_cell()
    gateway = await new.gateway()
    assert first.scheduler_epoch < again.scheduler_epoch
    assert gateway.scheduler_epoch > (await state(old)).scheduler_epoch
    assert (await state(new)).scheduler_epoch == gateway.scheduler_epoch


async def test_a_new_stream_of_a_worker_replaces_the_old_one(cell: Cell) -> None:
    old, gateway = await cell.worker(), await cell.gateway()
    await gateway.submit(make_spec("r"))
    await old.offer()
    await old.report(("r", RUNNING))
    await until_worker(cell, running_requests=1)
    running = scheduler_pb2.RequestProgress(key=make_key("r"), state=RUNNING)
    new = await cell.worker(in_flight=[running])
    with pytest.raises(grpc.aio.AioRpcError, match="a newer stream of worker w0") as raised:
        await old.receive()
    assert raised.value.code() is grpc.StatusCode.ABORTED
    assert len((await state(cell)).workers) == 1
    await gateway.submit(make_spec("s"))
    assert (await new.offer()).request.key == make_key("s")


async def test_a_worker_that_skips_a_change_of_residency_must_register_again(cell: Cell) -> None:
    worker = await cell.worker()

    def delta(sequence: int, adapter: str) -> scheduler_pb2.ResidencyDelta:
        resident = scheduler_pb2.ResidentAdapter(adapter_version=adapter, tier=types_pb2.TIER_PAGES, num_pages=2)
        return scheduler_pb2.ResidencyDelta(sequence=sequence, adapter=resident)

    await worker.report(
        residency=[delta(7, "a"), delta(8, "b")], memory=scheduler_pb2.MemoryUsage(total_pages=64, free_pages=64)
    )
    while not (snapshot := (await state(cell)).workers[0]).resident:
        pass
    assert [resident.adapter_version for resident in snapshot.resident] == ["a", "b"]
    assert snapshot.memory.total_pages == 64
    await worker.report(residency=[delta(10, "c")])
    with pytest.raises(grpc.aio.AioRpcError, match="register again") as raised:
        await worker.receive()
    assert raised.value.code() is grpc.StatusCode.ABORTED


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"base_fingerprint": "other"}, "worker w1 has base model fingerprint 'other'; worker w0 .* has 'base'"),
        ({"tokenizer_digest": "other"}, "worker w1 has tokenizer digest 'other'; worker w0 .* has 'tokenizer'"),
        (
            {"geometry": types_pb2.ModelGeometry(num_layers=3, max_context_tokens=256)},
            "worker w1 has num_layers '3'; worker w0 of the fleet has '2'",
        ),
        ({"protocol_version": 99}, "worker w1 speaks protocol version 99; this scheduler speaks 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
async def test_a_worker_that_serves_something_else_is_refused(cell: Cell, model: dict[str, Any], message: str) -> None:
    await cell.worker()
    stranger = FakeWorker(cell.channel, "w1", model=make_model(**model))
    with pytest.raises(grpc.aio.AioRpcError, match=message) as raised:
        await stranger.register()
    assert raised.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert [worker.info.worker_id for worker in (await state(cell)).workers] == ["w0"]


async def test_a_gateway_of_another_protocol_is_refused(cell: Cell) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="gateway g speaks protocol version 2") as raised:
        await FakeGateway(cell.channel, "g").connect(protocol_version=2)
    assert raised.value.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_a_stream_begins_with_a_hello_and_has_only_one(cell: Cell) -> None:
    gateway = FakeGateway(cell.channel, "g")
    await gateway.abort(make_key("r"))
    with pytest.raises(grpc.aio.AioRpcError, match="must be a hello") as raised:
        await gateway.receive()
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    worker = await cell.worker()
    with pytest.raises(grpc.aio.AioRpcError, match="one hello"):
        await worker.register()


async def test_a_worker_without_a_capacity_is_refused(cell: Cell) -> None:
    worker = FakeWorker(cell.channel, "w0", capacity=scheduler_pb2.WorkerCapacity())
    with pytest.raises(grpc.aio.AioRpcError, match=r"has no capacity\.num_pages"):
        await worker.register()


async def test_a_clean_shutdown_ends_the_streams(start_cell: StartCell) -> None:
    cell = await start_cell(drain_seconds=1000.0)
    worker, gateway = await cell.worker(), await cell.gateway()
    async with asyncio.timeout(50.0):
        await cell.service.stop()
    for peer in (worker, gateway):
        with pytest.raises((EOFError, grpc.aio.AioRpcError)):
            await peer.receive()


def readers() -> list[str]:
    """The tasks that read from gateways and workers."""
    names = [getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks()]
    return [name for name in names if name.startswith("SchedulerServicer._read_")]


async def test_no_task_outlives_its_stream(cell: Cell) -> None:
    worker, gateway = await cell.worker(), await cell.gateway()
    await gateway.submit(make_spec("r"))
    await worker.offer()
    assert len(readers()) == 2
    worker.hang_up()
    gateway.hang_up()
    await until(cell, gateways=0)
    while (await state(cell)).workers or readers():
        pass


async def scrape(cell: Cell) -> list[str]:
    """The lines of /metrics."""

    def get() -> str:
        with urllib.request.urlopen(f"http://{cell.service.server.metrics_address}/metrics") as response:
            return str(response.read().decode())

    return (await asyncio.to_thread(get)).splitlines()


async def test_the_figures_are_exposed(cell: Cell) -> None:
    worker, gateway = await cell.worker(num_pages=8), await cell.gateway()
    await gateway.submit(make_spec("first", "a", max_tokens=8))
    await gateway.submit(make_spec("second", max_tokens=16))
    await worker.offer()
    await until(cell, queued_requests=1)

    lines = await scrape(cell)
    assert 'loraplex_scheduler_queued_requests{model="tiny"} 1.0' in lines
    assert 'loraplex_scheduler_queued_tokens{model="tiny"} 24.0' in lines
    assert 'loraplex_scheduler_workers{state="ready"} 1.0' in lines
    assert 'loraplex_scheduler_dispatch_total{reason="cold"} 1.0' in lines
    assert 'loraplex_scheduler_dispatch_total{reason="spill"} 0.0' in lines
    assert 'loraplex_scheduler_queue_wait_seconds_count{model="tiny",residency="store"} 1.0' in lines
    ages = [line for line in lines if line.startswith('loraplex_scheduler_oldest_request_age_seconds{model="tiny"}')]
    assert float(ages[0].split()[1]) > 0
    assert any(line.startswith("loraplex_scheduler_decision_seconds_count") for line in lines)


@pytest.mark.parametrize(
    ("policy", "unit", "lacks"), [("vtc", "tokens", 4.0), ("fair", "seconds", None), ("fcfs", "", None)]
)
async def test_who_waits_lacks_half_of_what_the_other_was_charged(
    start_cell: StartCell, policy: str, unit: str, lacks: float | None
) -> None:
    """Two tenants, room for one of them: eight prompt tokens are charged when they are given to the worker."""
    cell = await start_cell(policy=policy, worker_grace_seconds=1000.0)
    gateway = await cell.gateway()
    for tenant in ("one", "two"):
        spec = make_spec(tenant, max_tokens=24)
        spec.key.tenant = tenant
        await gateway.submit(spec)
    await until(cell, queued_requests=2)
    worker = await cell.worker(num_pages=8)
    given = (await worker.offer()).request.key.tenant
    (waiting,) = (await until(cell, queued_requests=1)).tenants
    assert waiting.HasField("deficit") is bool(unit)
    assert lacks is None or waiting.deficit == lacks
    prefix = "loraplex_scheduler_fairness_deficit_"
    lines = [line for line in await scrape(cell) if line.startswith(prefix)]
    shown = [(given, 0.0), (waiting.tenant, waiting.deficit), ("_other", 0.0)] if unit else []
    assert sorted(lines) == sorted(f'{prefix}{unit}{{tenant="{tenant}"}} {value}' for tenant, value in shown)
    assert waiting.deficit > 0 or not unit


async def test_a_fenced_worker_leaves_a_log_line_and_a_metric(cell: Cell, caplog: pytest.LogCaptureFixture) -> None:
    worker = await cell.worker()
    with caplog.at_level(logging.ERROR, logger="scheduler.dispatcher"):
        await worker.report(memory=scheduler_pb2.MemoryUsage(free_pages=1))
        with pytest.raises(grpc.aio.AioRpcError, match="reports what cannot be"):
            await worker.command()
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["worker fenced"]

    assert 'loraplex_scheduler_workers_fenced_total{reason="pages"} 1.0' in await scrape(cell)
