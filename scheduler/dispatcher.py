"""The core among its peers: messages become events, `schedule()` runs when something changed, decisions are sent."""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import NoReturn

from prometheus_client import CollectorRegistry

from common.errors import Conflict, FailedPrecondition, Unavailable
from loraplex.v1 import scheduler_pb2, types_pb2
from scheduler.convert import (
    from_answer,
    from_commands,
    from_residency,
    from_tenant,
    to_hello,
    to_key,
    to_report,
    to_request,
)
from scheduler.core.commands import Decisions, Offer, Refused
from scheduler.core.explain import explain
from scheduler.core.fleet import FencedError
from scheduler.core.identity import IdentityMismatchError
from scheduler.core.intake import NonsenseError, ReportGapError
from scheduler.core.scheduler import Scheduler
from scheduler.core.settings import Settings
from scheduler.metrics import FairnessDeficit, SchedulerMetrics
from scheduler.peers import GatewayPeer, WorkerPeer

_log = logging.getLogger(__name__)

# How soon a scheduler that may not decide looks whether it may again.
WAIT_SECONDS = 0.05


class Dispatcher:
    """Owns the core, its clock and the sending side of every stream. One event loop; events never wait."""

    def __init__(
        self,
        settings: Settings,
        registry: CollectorRegistry,
        epoch: int,
        may_decide: Callable[[], bool],
        max_tenant_labels: int,
    ) -> None:
        """`may_decide` is asked before each decision; while it says no, decisions wait."""
        self._may_decide = may_decide
        self._core = Scheduler(settings, epoch, time.monotonic())
        self._metrics = SchedulerMetrics(registry, self._oldest_age_seconds)
        self._deficit: FairnessDeficit | None = None
        if unit := self._core.service_unit:
            self._deficit = FairnessDeficit(registry, unit, self._core.deficits, max_tenant_labels)
        self._gateways: dict[str, GatewayPeer] = {}
        self._workers: dict[str, WorkerPeer] = {}
        self._changed = asyncio.Event()
        self._closed = False
        # When the oldest queued request arrived; read by the thread that renders the metrics.
        self._oldest_arrival: float | None = None

    async def run(self) -> None:
        """Decides whenever something changed or a time has come. Runs until cancelled."""
        while True:
            wakeup = self._core.next_wakeup()
            try:
                async with asyncio.timeout(None if wakeup is None else max(0.0, wakeup - time.monotonic())):
                    await self._changed.wait()
            except TimeoutError:
                pass
            self._changed.clear()
            if self._may_decide():
                self._decide()
            else:
                self._changed.set()
                await asyncio.sleep(WAIT_SECONDS)

    def close(self) -> None:
        """Ends all streams and takes no new ones."""
        self._closed = True
        for gateway in self._gateways.values():
            gateway.close()
        for worker in self._workers.values():
            worker.close()

    # Events of gateways.

    def connect(self, hello: scheduler_pb2.GatewayHello) -> GatewayPeer:
        """A gateway's stream begins; it is told of the workers at once. Raises Unavailable during shutdown."""
        self._check_open()
        if old := self._gateways.get(hello.gateway_id):
            old.close(_replaced("gateway", hello.gateway_id))
            self.disconnect(old)
        peer = GatewayPeer(hello.gateway_id)
        self._gateways[peer.peer_id] = peer
        self._core.gateway_connected(peer.peer_id)
        self._metrics.gateways.set(len(self._gateways))
        welcome = scheduler_pb2.SchedulerWelcome(scheduler_epoch=self._core.epoch)
        peer.send(scheduler_pb2.ConnectResponse(welcome=welcome))
        peer.send(self._worker_list())
        self._changed.set()
        _log.info("gateway connected", extra={"gateway_id": peer.peer_id})
        return peer

    def disconnect(self, peer: GatewayPeer) -> None:
        """Its stream has ended. Does nothing when a newer stream has taken its place."""
        if self._gateways.get(peer.peer_id) is peer:
            del self._gateways[peer.peer_id]
            self._metrics.gateways.set(len(self._gateways))
            self._core.gateway_lost(peer.peer_id, time.monotonic())
            self._changed.set()
            _log.info("gateway lost", extra={"gateway_id": peer.peer_id})

    def submit(self, peer: GatewayPeer, spec: types_pb2.RequestSpec) -> None:
        if self._gateways.get(peer.peer_id) is peer:
            now = time.monotonic()
            # Whose stream it is decides, not what the message says.
            spec.gateway_id = peer.peer_id
            if self._deficit is not None:
                self._deficit.submitted(spec.key.tenant)
            self._core.submit(to_request(spec, now), now)
            self._changed.set()

    def abort(self, peer: GatewayPeer, abort: scheduler_pb2.Abort) -> None:
        if self._gateways.get(peer.peer_id) is peer:
            self._core.abort(to_key(abort.key), abort.cause)
            self._changed.set()

    # Events of workers.

    def register(self, hello: scheduler_pb2.WorkerHello) -> WorkerPeer:
        """A worker's stream begins; it replaces an older one of the same id.

        Raises FailedPrecondition when it serves something else than the fleet, InvalidArgument on a missing field,
        Unavailable during shutdown and while the worker is fenced.
        """
        self._check_open()
        try:
            epoch = self._core.register(to_hello(hello), time.monotonic())
        except IdentityMismatchError as error:
            raise FailedPrecondition(error.reason, error.message) from None
        except FencedError as error:
            raise Unavailable("WORKER_FENCED", str(error), retry_after_seconds=1.0) from None
        if old := self._workers.get(hello.worker_id):
            old.close(_replaced("worker", hello.worker_id))
        peer = self._workers[hello.worker_id] = WorkerPeer(hello, epoch)
        welcome = scheduler_pb2.SchedulerWelcome(scheduler_epoch=epoch)
        peer.send(scheduler_pb2.RegisterResponse(welcome=welcome))
        self._metrics.set_model(hello.model.name)
        self._workers_changed()
        details = {"worker_id": peer.peer_id, "address": peer.info.address, "in_flight": len(hello.in_flight)}
        _log.info("worker registered", extra=details)
        return peer

    def unregister(self, peer: WorkerPeer) -> None:
        """Its stream has ended. Does nothing when a newer stream has taken its place."""
        if self._workers.get(peer.peer_id) is peer:
            del self._workers[peer.peer_id]
            self._core.worker_lost(peer.peer_id, time.monotonic())
            self._metrics.worker_lost(draining=peer.info.state == scheduler_pb2.WORKER_STATE_DRAINING)
            self._workers_changed()
            _log.warning("worker lost", extra={"worker_id": peer.peer_id})

    def report(self, peer: WorkerPeer, report: scheduler_pb2.StepReport) -> None:
        """Raises Conflict when the worker must register anew, FailedPrecondition when it is fenced."""
        if self._workers.get(peer.peer_id) is not peer:
            return
        if report.HasField("memory"):
            peer.memory = report.memory
        try:
            changed = self._core.report(peer.peer_id, to_report(report), time.monotonic())
        except ReportGapError as error:
            self._metrics.residency_gaps.inc()
            raise Conflict("RESIDENCY_GAP", f"{error}; register again") from None
        except NonsenseError as error:
            self._fence(peer, error)
        if changed:
            self._changed.set()
        if report.state and report.state != peer.info.state:
            peer.info.state = report.state
            self._workers_changed()

    def _fence(self, peer: WorkerPeer, error: NonsenseError) -> NoReturn:
        """Ends the stream of a worker that reports nonsense, and lets it register again only after a while."""
        self._core.fence(peer.peer_id, time.monotonic())
        self._metrics.fenced(error.reason)
        _log.error("worker fenced: %s", error, extra={"worker_id": peer.peer_id, "reason": error.reason})
        raise FailedPrecondition("WORKER_FENCED", f"worker {peer.peer_id} reports what cannot be: {error}")

    # Questions of operators.

    def state(self) -> scheduler_pb2.GetStateResponse:
        queue = self._core.queue
        return scheduler_pb2.GetStateResponse(
            scheduler_epoch=self._core.epoch,
            queued_requests=queue.num_requests,
            queued_tokens=queue.num_tokens,
            workers=[self._snapshot(peer) for _, peer in sorted(self._workers.items())],
            gateways=len(self._gateways),
            policy=self._core.settings.policy,
            tenants=[from_tenant(tenant) for tenant in self._core.tenants()],
        )

    def explain(self, request_id: str) -> list[str]:
        return explain(self._core, request_id, time.monotonic())

    def _snapshot(self, peer: WorkerPeer) -> scheduler_pb2.WorkerSnapshot:
        worker = self._core.fleet.get(peer.peer_id)
        assert worker is not None
        return scheduler_pb2.WorkerSnapshot(
            info=peer.info,
            capacity=peer.capacity,
            memory=peer.memory,
            offered_requests=worker.num_waiting,
            running_requests=worker.num_running,
            resident=[from_residency(residency) for _, residency in sorted(worker.residents.items())],
            applied_seq=worker.applied_seq,
            line_requests=worker.line.num_requests,
            line_seconds=worker.line.cost_seconds,
            adapters_in_use=len(worker.in_use.names),
            step_budget_tokens=worker.step_budget or 0,
        )

    # What follows from events.

    def _decide(self) -> None:
        now = time.monotonic()
        with self._metrics.decision_seconds.time():
            decisions = self._core.schedule(now)
        self._send(decisions)
        if decisions.incomplete:
            self._changed.set()
        queue = self._core.queue
        self._oldest_arrival = queue.oldest.arrived if queue.oldest else None
        self._metrics.set_queue(queue.num_requests, queue.num_tokens)

    def _send(self, decisions: Decisions) -> None:
        for worker_id, commands in decisions.commands.items():
            peer = self._workers[worker_id]
            for message in from_commands(peer.scheduler_epoch, commands):
                peer.send(message)
            for command in commands:
                if isinstance(command.action, Offer):
                    self._metrics.offered(command.action)
        for gateway_id, answers in decisions.answers.items():
            for answer in answers:
                self._gateways[gateway_id].send(from_answer(answer))
                if isinstance(answer, Refused):
                    self._metrics.refused(answer.refusal)

    def _check_open(self) -> None:
        if self._closed:
            raise Unavailable("DRAINING", "this scheduler is shutting down", retry_after_seconds=1.0)

    def _workers_changed(self) -> None:
        workers = self._worker_list()
        for peer in self._gateways.values():
            peer.send(workers)
        draining = sum(worker.draining for worker in self._core.fleet.workers)
        self._metrics.set_workers(len(self._workers) - draining, draining)
        self._changed.set()

    def _worker_list(self) -> scheduler_pb2.ConnectResponse:
        infos = [peer.info for _, peer in sorted(self._workers.items())]
        return scheduler_pb2.ConnectResponse(workers=scheduler_pb2.WorkerList(workers=infos))

    def _oldest_age_seconds(self) -> float:
        arrival = self._oldest_arrival
        return 0.0 if arrival is None else max(0.0, time.monotonic() - arrival)


def _replaced(kind: str, peer_id: str) -> Conflict:
    return Conflict("STREAM_REPLACED", f"a newer stream of {kind} {peer_id} has taken the place of this one")
