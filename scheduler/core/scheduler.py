"""Who runs where, and in which order: events in, `schedule()` out. No clock, no I/O, no threads."""

from collections.abc import Mapping

from scheduler.core import refusals
from scheduler.core.adoption import Fate, Verdict, is_unconfirmed, judge
from scheduler.core.clock import Clock
from scheduler.core.commands import Abort, Decisions, Placed, Refusal, Refused, StepBudget
from scheduler.core.costs import CostModel
from scheduler.core.fleet import Fleet
from scheduler.core.intake import Intake, ReportGapError
from scheduler.core.lifecycle import Lifecycle
from scheduler.core.model import Hello, Key, Report, Request, RequestState, TenantState
from scheduler.core.pacing import new_step_budget
from scheduler.core.policies import make_policy
from scheduler.core.policies.protocol import Unit
from scheduler.core.rounds import Rounds
from scheduler.core.settings import Settings
from scheduler.core.worker import Worker


class Scheduler:
    """The state of one fleet. Every `now` is in seconds on the caller's clock and never falls."""

    def __init__(self, settings: Settings, epoch: int, now: float) -> None:
        """`epoch` is greater than that of any scheduler before: Unix milliseconds."""
        self.settings = settings
        self.epoch = epoch
        self._clock = Clock(now)
        costs = CostModel()
        policy = make_policy(settings, costs, self._clock)
        self.fleet = Fleet(settings, policy, epoch, self._clock)
        self.life = Lifecycle(settings, epoch, self.fleet, policy, costs)
        self.queue, self.requests = self.life.queue, self.life.requests
        # Nothing is placed before; workers with sequences of an earlier scheduler come back until then.
        self.recovered_at = now + settings.recovery_seconds
        self._rounds = Rounds(self.fleet, self.life, settings)
        # Worker id -> who checks the reports of its registration.
        self._intakes: dict[str, Intake] = {}

    # Events of gateways.

    def gateway_connected(self, gateway_id: str) -> None:
        """A gateway's stream begins; requests of an earlier stream that workers have go on."""
        self.requests.connect(gateway_id)

    def gateway_lost(self, gateway_id: str, now: float) -> None:
        """Requests it was never told to be placed are dropped: it submits them again. The others are aborted if it
        stays away."""
        self._clock.now = now
        gateway = self.requests.gateways[gateway_id]
        gateway.lost_until = now + self.settings.gateway_grace_seconds
        for request in list(gateway.requests.values()):
            request.successor = None
            if request.state is RequestState.QUEUED and not request.offer_seq:
                self.life.abort(request)

    def submit(self, request: Request, now: float) -> None:
        """Queues an attempt, or refuses it at once. An attempt that a worker has already is answered with Placed."""
        self._clock.now = request.arrived = now
        newest = self.requests.newest(request.key)
        if newest and newest.key.attempt > request.key.attempt:
            return
        if known := self.requests.get(request.key):
            self._submit_again(known, request)
            return
        if newest:
            self.life.abort(newest)
        if refusal := self._refusal(request):
            self.requests.answer(request, Refused(request.key, refusal))
            return
        self.life.accept(request)

    def abort(self, key: Key, cause: int = 0) -> None:
        """Ends an attempt wherever it is. Idempotent; unknown keys are ignored. The worker is told the `cause`."""
        if request := self.requests.get(key):
            request.successor = None
            request.abort_cause = cause
            self.life.abort(request)

    def _refusal(self, request: Request) -> Refusal | None:
        """Why the request must not enter the queue; None when it may."""
        limit = self.fleet.identity.max_context_tokens if self.fleet.identity else 0
        if limit and request.context_tokens > limit:
            return refusals.context_too_long(request, limit)
        workers = self.fleet.workers
        if workers and not any(worker.room.could_ever_fit(request) for worker in workers):
            return refusals.too_large(request, workers)
        num_requests = self.queue.num_requests + 1
        num_tokens = self.queue.num_tokens + request.cost_tokens
        if num_requests > self.settings.max_queued_requests or num_tokens > self.settings.max_queued_tokens:
            return refusals.queue_full(num_requests, num_tokens, self.settings)
        return None

    def _submit_again(self, known: Request, request: Request) -> None:
        """A key that is known: a gateway came back and submits what it does not know to be placed, or a client used a
        request id again while its last request is still on its way out of a worker."""
        gateway = self.requests.gateways.get(request.gateway_id)
        same_stream = gateway is not None and known.connection == gateway.connection
        if known.state is RequestState.QUEUED:
            self.requests.claim(known, request.gateway_id)
        elif known.aborted or (same_stream and known.gateway_id == request.gateway_id):
            known.successor = request
            self.life.abort(known)
        else:
            self.requests.claim(known, request.gateway_id)
            self.requests.answer(known, Placed(known.key, known.worker_id))

    # Events of workers.

    def register(self, hello: Hello, now: float) -> int:
        """A worker's stream begins and replaces an earlier one of the same id; returns the epoch of its commands.

        Each registration has an epoch of its own, because a worker that comes back may be another process: its
        commands count from 1. Raises IdentityMismatchError when it serves something else than the other workers, and
        FencedError while it is kept out.
        """
        self._clock.now = now
        worker, previous = self.fleet.register(hello, now)
        self._intakes[worker.worker_id] = Intake(worker)
        if previous is not None:
            previous.acknowledge(hello.scheduler_epoch, hello.applied_seq)
        for verdict in judge(hello.in_flight, previous, self.requests):
            self._carry_out(verdict, worker, now)
        self.life.open_line(worker)
        self.life.touch(worker.worker_id)
        return worker.epoch

    def _carry_out(self, verdict: Verdict, worker: Worker, now: float) -> None:
        match verdict.fate:
            case Fate.ADOPT:
                assert verdict.progress is not None
                self.life.adopt(verdict.request, verdict.progress, worker, now)
            case Fate.ABORT:
                worker.disowned.add(verdict.key)
                worker.command(Abort(verdict.key))
            case Fate.QUEUE:
                assert verdict.request is not None
                self.life.requeue(verdict.request)
            case Fate.FORGET:
                if verdict.request is not None:
                    self.life.lose(verdict.request, now)

    def worker_lost(self, worker_id: str, now: float) -> None:
        """What waits for it waits for others. Its requests are forgotten, unless it registers again within the grace
        and still has them."""
        self._clock.now = now
        self.fleet.lose(worker_id, now)
        del self._intakes[worker_id]
        self.life.end_line(worker_id)

    def report(self, worker_id: str, report: Report, now: float) -> bool:
        """Takes in what a worker says; True when `schedule()` may decide otherwise than before.

        Reports that come out of order wait for those before them. Raises ReportGapError when one, or a change of
        residency, is missing, and NonsenseError when the worker must be kept out: see `fence`.
        """
        self._clock.now = now
        worker = self.fleet.get(worker_id)
        if worker is None:
            return False
        changed = False
        for due in self._intakes[worker_id].take(report):
            changed |= self._take_in(worker, due, now)
        return changed

    def fence(self, worker_id: str, now: float) -> None:
        """The worker reported nonsense: it may not register for a while."""
        self.fleet.fence(worker_id, now)

    def _take_in(self, worker: Worker, report: Report, now: float) -> bool:
        worker.acknowledge(report.scheduler_epoch, report.applied_seq)
        changed = bool(report.residency)
        if report.draining is not None and report.draining != worker.draining:
            changed = True
            self._change_readiness(worker, now, draining=report.draining)
        for progress in report.progress:
            changed |= self.life.advance(worker, progress, now)
        if not worker.move_adapters(report.residency):
            raise ReportGapError(f"a change of residency is missing in the reports of worker {worker.worker_id}")
        if report.costs is not None:
            if (facts := worker.facts.add(report.costs)) is not None:
                self.life.costs.update(facts)
                worker.costs.update(facts)
            if facts and (tokens := new_step_budget(worker, self.settings)) is not None:
                worker.command(StepBudget(tokens))
                changed = True
        if changed:
            self.life.touch(worker.worker_id)
        return changed

    def _change_readiness(self, worker: Worker, now: float, *, draining: bool) -> None:
        worker.draining = draining
        self.fleet.note_readiness(now)
        if draining:
            self.life.end_line(worker.worker_id)
            if self.life.placement.workers:
                self.life.take_back(worker)
        else:
            self.life.assign_waiting()

    # Decisions.

    def schedule(self, now: float) -> Decisions:
        """Decides what can be decided now, within a bounded time. Returns what to tell whom since the last call."""
        self._clock.now = now
        self._expire(now)
        incomplete = False
        if now >= self.recovered_at:
            if not self.life.assigning:
                self.life.assigning = True
                self.life.assign_waiting()
            incomplete = not self._rounds.run(now)
        decisions = Decisions(answers=self.requests.take_answers(), incomplete=incomplete)
        for worker in self.fleet.workers:
            if worker.outbox:
                decisions.commands[worker.worker_id] = worker.take_commands()
        return decisions

    def next_wakeup(self) -> float | None:
        """When `schedule()` must run though no event came; None when only an event can change anything."""
        times = [lost.until for lost in self.fleet.lost.values()]
        times += [gateway.lost_until for gateway in self.requests.gateways.values() if gateway.lost_until is not None]
        times += [worker.wake_at for worker in self.fleet.workers if worker.wake_at is not None]
        if self.queue.num_requests:
            # Whatever `now` is: the last decision may have been made a moment before that time, this question after.
            if not self.life.assigning:
                times.append(self.recovered_at)
            if self.fleet.grace_end is not None:
                times.append(self.fleet.grace_end)
        if (lost_at := self.life.deadlines.next_time) is not None:
            times.append(lost_at)
        return min(times, default=None)

    def tenants(self) -> list[TenantState]:
        """Those with queued requests, by name. O(n): for operators."""
        queued: dict[str, list[float]] = {}
        for request in self.queue:
            queued.setdefault(request.tenant, []).append(request.cost)
        weights, policy, deficits = self.settings.tenant_weights, self.life.policy, self.deficits()
        return [
            TenantState(
                tenant,
                weights.get(tenant, 1.0),
                len(costs),
                sum(costs),
                policy.service(tenant),
                deficits.get(tenant),
            )
            for tenant, costs in sorted(queued.items())
        ]

    @property
    def service_unit(self) -> Unit:
        """What the service of tenants is counted in; empty when it is not counted."""
        return self.life.policy.unit

    def deficits(self) -> Mapping[str, float]:
        """Service that each tenant that waits lacks of its share; O(tenants), on any thread."""
        return self.life.policy.deficits()

    def _expire(self, now: float) -> None:
        for worker in self.fleet.take_expired(now):
            for request in list(worker.requests.values()):
                if is_unconfirmed(request, worker) and not request.aborted:
                    self.requests.answer(request, Refused(request.key, refusals.worker_lost(worker, self.settings)))
                self.life.lose(request, now)
        for gateway in list(self.requests.gateways.values()):
            if gateway.lost_until is not None and gateway.lost_until <= now:
                for request in list(gateway.requests.values()):
                    self.life.abort(request)
                del self.requests.gateways[gateway.gateway_id]
        self.life.drop_lost(now)
        if (grace_end := self.fleet.grace_end) is not None and grace_end <= now:
            waited = self.fleet.seconds_without_worker(now)
            for request in sorted(self.queue, key=lambda request: request.number):
                self.life.refuse(request, refusals.no_worker(waited, self.settings))
