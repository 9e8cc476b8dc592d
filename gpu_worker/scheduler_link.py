"""The worker's stream to the scheduler: hello with everything it holds, reports out, commands in, again and again."""

import asyncio
import logging

import grpc

from common.channel import connect
from common.errors import LoraplexError
from common.tls import PemFiles
from gpu_worker.face import Face
from loraplex.v1 import engine_pb2, scheduler_pb2, scheduler_pb2_grpc

_log = logging.getLogger(__name__)

# Reports ride together: the scheduler needs counts, not every step.
REPORT_SECONDS = 0.02
RETRY_SECONDS = 0.2
_SERVICE = scheduler_pb2.DESCRIPTOR.services_by_name["SchedulerService"].full_name


class ReportBuffer:
    """Merges step reports until they are sent: latest state of each request, every change of residency."""

    def __init__(self) -> None:
        # Without progress and residency.
        self._latest = scheduler_pb2.StepReport()
        self._progress: dict[tuple[str, str, int], scheduler_pb2.RequestProgress] = {}
        self._residency: list[scheduler_pb2.ResidencyDelta] = []
        self._costs = scheduler_pb2.StepCosts()
        # Reports since the hello.
        self._number = 0
        self.pending = asyncio.Event()

    def add(self, report: scheduler_pb2.StepReport) -> None:
        self._latest.CopyFrom(report)
        self._latest.ClearField("progress")
        self._latest.ClearField("residency")
        self._latest.ClearField("costs")
        self._add_costs(report.costs)
        for progress in report.progress:
            key = progress.key
            self._progress[key.tenant, key.request_id, key.attempt] = progress
        self._residency.extend(report.residency)
        self.pending.set()

    def take(self) -> scheduler_pb2.StepReport:
        """The merged report; when nothing was added, the latest figures again."""
        merged = scheduler_pb2.StepReport()
        merged.CopyFrom(self._latest)
        merged.progress.extend(self._progress.values())
        merged.residency.extend(self._residency)
        if self._costs.steps:
            merged.costs.CopyFrom(self._costs)
        self._forget()
        self._number += 1
        merged.report_number = self._number
        return merged

    def clear(self) -> None:
        """Forgets the changes; the figures stay true, and reports count from 1 again."""
        self._forget()
        self._number = 0

    def _add_costs(self, costs: scheduler_pb2.StepCosts) -> None:
        self._costs.steps += costs.steps
        self._costs.seconds += costs.seconds
        self._costs.prefill_tokens += costs.prefill_tokens
        self._costs.decode_tokens += costs.decode_tokens
        self._costs.distinct_adapters += costs.distinct_adapters

    def _forget(self) -> None:
        self._costs.Clear()
        self._progress.clear()
        self._residency.clear()
        self.pending.clear()


class SchedulerLink:
    """Registers with the scheduler for as long as the worker lives; its loss stops no running stream."""

    def __init__(self, address: str, advertise_address: str, face: Face, tls: PemFiles | None = None) -> None:
        self._channel = connect(address, service=_SERVICE, tls=tls)
        self._advertise_address = advertise_address
        self._face = face
        self._reports = ReportBuffer()
        self._snapshot: asyncio.Future[engine_pb2.EngineSnapshot] | None = None
        self._state = scheduler_pb2.WORKER_STATE_READY
        self.registered = asyncio.Event()
        face.on_report = self._reports.add
        face.on_snapshot = self._take_snapshot
        face.on_engine_lost = self._hang_up
        self._last_end = ""
        self._session: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Registers, serves the stream, and registers again when it breaks. Runs until cancelled."""
        while True:
            if self._face.ready is not None:
                self._session = asyncio.create_task(self._serve())
                try:
                    # Not `await session`: cancelling this task must not look like the session's own end.
                    await asyncio.wait({self._session})
                finally:
                    self._session.cancel()
                    self.registered.clear()
                self._note_end(self._session)
            await asyncio.sleep(RETRY_SECONDS)

    def _note_end(self, session: asyncio.Task[None]) -> None:
        """Logs why the session ended, once for each reason. Raises what no fault of the peer explains."""
        problem = None if session.cancelled() else session.exception()
        if problem is not None and not isinstance(problem, grpc.RpcError | LoraplexError):
            raise problem
        reason = _describe(problem) if problem else "closed"
        if reason != self._last_end:
            _log.warning("the scheduler's stream ended: %s", reason)
        self._last_end = reason

    async def drain(self) -> None:
        """Tells the scheduler to offer nothing more."""
        self._state = scheduler_pb2.WORKER_STATE_DRAINING
        self._reports.pending.set()

    async def close(self) -> None:
        await self._channel.close()

    async def _serve(self) -> None:
        # Before the call: a write to one that has ended meanwhile does not say why it ended.
        hello = await self._hello()
        stub = scheduler_pb2_grpc.SchedulerServiceStub(self._channel)
        call = stub.Register()
        try:
            await call.write(scheduler_pb2.RegisterRequest(hello=hello))
            writer = asyncio.create_task(self._write_reports(call))
            try:
                async for response in call:
                    if response.HasField("welcome"):
                        self.registered.set()
                        self._last_end = ""
                    elif response.HasField("commands"):
                        self._face.send_scheduler_commands(response.commands)
            finally:
                writer.cancel()
                await asyncio.gather(writer, return_exceptions=True)
        finally:
            call.cancel()

    async def _hello(self) -> scheduler_pb2.WorkerHello:
        """Everything the engine holds; reports after it continue from there."""
        self._snapshot = asyncio.get_running_loop().create_future()
        self._face.send(engine_pb2.EngineCommand(take_snapshot=engine_pb2.TakeSnapshot()))
        snapshot = await self._snapshot
        ready = self._face.ready
        return scheduler_pb2.WorkerHello(
            worker_id=self._face.worker_id,
            address=self._advertise_address,
            model=self._face.model,
            capacity=ready.capacity if ready else None,
            in_flight=snapshot.in_flight,
            resident=snapshot.resident,
            memory=snapshot.memory,
            scheduler_epoch=snapshot.scheduler_epoch,
            applied_seq=snapshot.applied_seq,
        )

    def _take_snapshot(self, snapshot: engine_pb2.EngineSnapshot) -> None:
        # What was reported before the snapshot is in it.
        self._reports.clear()
        if self._snapshot is not None and not self._snapshot.done():
            self._snapshot.set_result(snapshot)

    async def _write_reports(
        self, call: "grpc.aio.StreamStreamCall[scheduler_pb2.RegisterRequest, scheduler_pb2.RegisterResponse]"
    ) -> None:
        while True:
            await self._reports.pending.wait()
            report = self._reports.take()
            report.worker_id = self._face.worker_id
            report.state = self._state
            await call.write(scheduler_pb2.RegisterRequest(report=report))
            await asyncio.sleep(REPORT_SECONDS)

    def _hang_up(self) -> None:
        """The engine is gone: the scheduler must forget what it had."""
        # At once: whoever asks before the session has ended must not take the worker for ready.
        self.registered.clear()
        if self._session is not None:
            self._session.cancel()


def _describe(error: BaseException) -> str:
    if isinstance(error, LoraplexError):
        return error.message
    return f"{error.code().name}: {error.details()}" if isinstance(error, grpc.Call) else type(error).__name__
