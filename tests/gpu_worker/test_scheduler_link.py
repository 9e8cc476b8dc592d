"""The worker's stream to the scheduler: reports ride together, and it registers again and again."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, cast

import pytest

from common.errors import FailedPrecondition
from gpu_worker.face import Face
from gpu_worker.scheduler_link import ReportBuffer, SchedulerLink
from loraplex.v1 import engine_pb2, scheduler_pb2, types_pb2
from tests.gpu_worker.engine_driver import key, new_offer
from tests.gpu_worker.neighbours import FakeScheduler, serving

TIMEOUT_SECONDS = 100.0
RUNNING, FINISHED = scheduler_pb2.REQUEST_STATE_RUNNING, scheduler_pb2.REQUEST_STATE_FINISHED


def report(
    step_number: int, progress: dict[str, "scheduler_pb2.RequestState.ValueType"] | None = None, delta: int = 0
) -> scheduler_pb2.StepReport:
    made = scheduler_pb2.StepReport(step_number=step_number, applied_seq=step_number)
    for name, state in (progress or {}).items():
        made.progress.add(key=key(name), state=state)
    if delta:
        made.residency.add(sequence=delta)
    return made


class TestReportBuffer:
    async def test_the_latest_figures_are_sent(self) -> None:
        buffer = ReportBuffer()
        buffer.add(report(1))
        buffer.add(report(2))
        assert buffer.take().step_number == 2

    async def test_the_latest_state_of_each_request_is_sent(self) -> None:
        buffer = ReportBuffer()
        buffer.add(report(1, {"s": RUNNING, "t": RUNNING}))
        buffer.add(report(2, {"s": FINISHED}))
        states = {progress.key.request_id: progress.state for progress in buffer.take().progress}
        assert states == {"s": FINISHED, "t": RUNNING}

    async def test_every_change_of_residency_is_sent(self) -> None:
        buffer = ReportBuffer()
        for number in (1, 2, 3):
            buffer.add(report(number, delta=number))
        assert [delta.sequence for delta in buffer.take().residency] == [1, 2, 3]

    async def test_a_change_is_sent_once(self) -> None:
        buffer = ReportBuffer()
        buffer.add(report(1, {"s": RUNNING}, delta=1))
        buffer.take()
        buffer.add(report(2))
        again = buffer.take()
        assert again.report_number == 2
        again.ClearField("report_number")
        assert again == report(2)

    async def test_figures_are_still_true_when_nothing_was_added(self) -> None:
        buffer = ReportBuffer()
        buffer.add(report(7, {"s": RUNNING}))
        buffer.take()
        again = buffer.take()
        again.ClearField("report_number")
        assert again == report(7)

    async def test_nothing_is_pending_after_a_take(self) -> None:
        buffer = ReportBuffer()
        buffer.add(report(1))
        pending = buffer.pending.is_set()
        buffer.take()
        assert (pending, buffer.pending.is_set()) == (True, False)


class FakeFace:
    """A face whose engine is in the middle of a step when it is asked for a snapshot."""

    worker_id = "w"

    def __init__(self) -> None:
        self.model = types_pb2.ModelIdentity(name="tiny")
        self.ready = engine_pb2.EngineReady(model=self.model)
        self.snapshots_taken: asyncio.Queue[None] = asyncio.Queue()
        self.commands: asyncio.Queue[scheduler_pb2.CommandBatch] = asyncio.Queue()
        self.on_report: Callable[[scheduler_pb2.StepReport], None]
        self.on_snapshot: Callable[[engine_pb2.EngineSnapshot], None]
        self.on_engine_lost: Callable[[], None]

    def send(self, command: engine_pb2.EngineCommand) -> None:
        assert command.HasField("take_snapshot")
        self.snapshots_taken.put_nowait(None)
        snapshot = engine_pb2.EngineSnapshot(in_flight=[scheduler_pb2.RequestProgress(key=key("s"))])
        asyncio.get_running_loop().call_later(0.1, self.on_snapshot, snapshot)

    def send_scheduler_commands(self, batch: scheduler_pb2.CommandBatch) -> None:
        self.commands.put_nowait(batch)


@pytest.fixture
async def face() -> FakeFace:
    return FakeFace()


@asynccontextmanager
async def linked(address: str, face: FakeFace) -> AsyncIterator[SchedulerLink]:
    link = SchedulerLink(address, "here:1", cast("Face", face))
    task = asyncio.create_task(link.run())
    try:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            yield link
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await link.close()


@pytest.fixture
async def scheduler() -> FakeScheduler:
    return FakeScheduler()


@pytest.fixture
async def link(face: FakeFace, scheduler: FakeScheduler) -> AsyncIterator[SchedulerLink]:
    async with serving(scheduler=scheduler) as address, linked(address, face) as link:
        await link.registered.wait()
        yield link


async def test_the_hello_says_who_it_is_and_what_it_holds(link: SchedulerLink, scheduler: FakeScheduler) -> None:
    hello = await scheduler.hellos.get()
    assert (hello.worker_id, hello.address, hello.in_flight[0].key.request_id) == ("w", "here:1", "s")


async def test_commands_go_to_the_face(link: SchedulerLink, face: FakeFace, scheduler: FakeScheduler) -> None:
    scheduler.command(offer=new_offer("s", [1]))
    batch = await face.commands.get()
    assert [command.seq for command in batch.commands] == [1]


async def test_reports_go_to_the_scheduler(link: SchedulerLink, face: FakeFace, scheduler: FakeScheduler) -> None:
    face.on_report(report(5))
    received = await scheduler.reports.get()
    assert (received.worker_id, received.step_number, received.state) == ("w", 5, scheduler_pb2.WORKER_STATE_READY)


async def test_a_draining_worker_says_so_beside_its_figures(
    link: SchedulerLink, face: FakeFace, scheduler: FakeScheduler
) -> None:
    face.on_report(report(5))
    await scheduler.reports.get()
    await link.drain()
    received = await scheduler.reports.get()
    assert (received.applied_seq, received.state) == (5, scheduler_pb2.WORKER_STATE_DRAINING)


async def test_a_worker_without_engine_is_not_registered_from_that_moment(link: SchedulerLink, face: FakeFace) -> None:
    face.on_engine_lost()
    assert not link.registered.is_set()


async def test_it_registers_anew_after_its_engine_was_lost(
    link: SchedulerLink, face: FakeFace, scheduler: FakeScheduler
) -> None:
    await scheduler.hellos.get()
    face.on_engine_lost()
    assert (await scheduler.hellos.get()).worker_id == "w"


async def test_a_scheduler_that_comes_late_is_found(face: FakeFace, scheduler: FakeScheduler) -> None:
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        async with linked(f"127.0.0.1:{port}", face):
            # The third attempt has begun: two have failed.
            for _ in range(3):
                await face.snapshots_taken.get()
            async with serving(scheduler=scheduler, port=port):
                assert (await scheduler.hellos.get()).worker_id == "w"


class OtherFleet(FakeScheduler):
    """Serves another model."""

    async def Register(
        self, requests: AsyncIterator[scheduler_pb2.RegisterRequest], context: Any
    ) -> AsyncIterator[scheduler_pb2.RegisterResponse]:
        raise FailedPrecondition("MODEL_MISMATCH", "another model")
        yield  # makes this an async generator


async def test_a_scheduler_that_says_no_is_asked_again(face: FakeFace) -> None:
    async with serving(scheduler=OtherFleet()) as address, linked(address, face) as link:
        for _ in range(2):
            await face.snapshots_taken.get()
        assert not link.registered.is_set()
