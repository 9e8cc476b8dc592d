"""Who runs where, and in which order: events in, `schedule()` out. No clock, no I/O, no threads."""

import heapq
import itertools
from contextlib import closing

from scheduler.core import refusals
from scheduler.core.fleet import Fleet
from scheduler.core.model import (
    Abort,
    Decisions,
    Ending,
    Hello,
    Key,
    Offer,
    Placed,
    Progress,
    Refusal,
    Refused,
    Report,
    Request,
    RequestState,
)
from scheduler.core.placement import Choice, Placement
from scheduler.core.requests import RequestTable
from scheduler.core.settings import Settings
from scheduler.core.waiting import WaitingQueue
from scheduler.core.worker import Worker

# Order keys of a later epoch are greater than those of an earlier one, whose sequences may still run.
_ORDER_KEYS_PER_EPOCH = 1 << 20
# Deadlines of requests that were placed meanwhile are swept out when there are more than these.
_SPARE_DEADLINES = 64


class ResidencyGapError(Exception):
    """A change of a worker's adapters is missing: only a new hello tells what it has."""


class Scheduler:
    """The state of one fleet. Every `now` is in seconds on the caller's clock and never falls."""

    def __init__(self, settings: Settings, epoch: int, now: float) -> None:
        """`epoch` is greater than that of any scheduler before: Unix milliseconds."""
        self.settings = settings
        self.epoch = epoch
        self.queue = WaitingQueue()
        self.requests = RequestTable()
        self.fleet = Fleet(settings, epoch, now)
        # Nothing is placed before; workers with sequences of an earlier scheduler come back until then.
        self.recovered_at = now + settings.recovery_seconds
        # No decision was made at or after that time yet.
        self._recovering = True
        self._order_keys = itertools.count(epoch * _ORDER_KEYS_PER_EPOCH)
        self._deadlines: list[tuple[float, int, Request]] = []
        self._deadline_numbers = itertools.count()

    # Events of gateways.

    def gateway_connected(self, gateway_id: str) -> None:
        """A gateway's stream begins; requests of an earlier stream that workers have go on."""
        self.requests.connect(gateway_id)

    def gateway_lost(self, gateway_id: str, now: float) -> None:
        """Requests it was never told to be placed are dropped: it submits them again. The others are aborted if it
        stays away."""
        gateway = self.requests.gateways[gateway_id]
        gateway.lost_until = now + self.settings.gateway_grace_seconds
        for request in list(gateway.requests.values()):
            request.successor = None
            if request.state is RequestState.QUEUED and not request.offer_seq:
                self._abort(request)

    def submit(self, request: Request, now: float) -> None:
        """Queues an attempt, or refuses it at once. An attempt that a worker has already is answered with Placed."""
        request.arrived = now
        newest = self.requests.newest(request.key)
        if newest and newest.key.attempt > request.key.attempt:
            return
        if known := self.requests.get(request.key):
            self._submit_again(known, request)
            return
        if newest:
            self._abort(newest)
        if refusal := self._refusal(request):
            self.requests.answer(request, Refused(request.key, refusal))
            return
        self._accept(request)

    def abort(self, key: Key, cause: int = 0) -> None:
        """Ends an attempt wherever it is. Idempotent; unknown keys are ignored. The worker is told the `cause`."""
        if request := self.requests.get(key):
            request.successor = None
            request.abort_cause = cause
            self._abort(request)

    # Events of workers.

    def register(self, hello: Hello, now: float) -> int:
        """A worker's stream begins and replaces an earlier one of the same id; returns the epoch of its commands.

        Each registration has an epoch of its own, because a worker that comes back may be another process: its
        commands count from 1. Raises IdentityMismatchError when it serves something else than the other workers.
        """
        worker, previous = self.fleet.register(hello, now)
        before = dict(previous.requests) if previous else {}
        for progress in hello.in_flight:
            self._adopt(worker, progress, before.pop(progress.key, None), now)
        for request in before.values():
            if previous and _unconfirmed(request, previous) and not request.aborted:
                self._enqueue(request)
            else:
                self._forget(request)
        return worker.epoch

    def worker_lost(self, worker_id: str, now: float) -> None:
        """Its requests are forgotten, unless it registers again within the grace and still has them."""
        self.fleet.lose(worker_id, now)

    def report(self, worker_id: str, report: Report, now: float) -> bool:
        """Takes in what a worker says; True when `schedule()` may decide otherwise than before.

        Unknown attempts are ignored. Raises ResidencyGapError when a change of residency is missing.
        """
        worker = self.fleet.get(worker_id)
        if worker is None:
            return False
        worker.acknowledge(report.scheduler_epoch, report.applied_seq)
        changed = bool(report.residency)
        if report.draining is not None and report.draining != worker.draining:
            changed, worker.draining = True, report.draining
            self.fleet.note_readiness(now)
        for progress in report.progress:
            changed |= self._advance(worker, progress)
        if not worker.move_adapters(report.residency):
            raise ResidencyGapError(f"a change of residency is missing in the reports of worker {worker_id}")
        return changed

    # Decisions.

    def schedule(self, now: float) -> Decisions:
        """Decides all that can be decided now. Returns what to tell whom since the last call."""
        self._expire(now)
        if now >= self.recovered_at:
            self._recovering = False
            self._place(now)
        decisions = Decisions(answers=self.requests.take_answers())
        for worker in self.fleet.workers:
            if commands := worker.take_commands():
                decisions.commands[worker.worker_id] = commands
        return decisions

    def next_wakeup(self) -> float | None:
        """When `schedule()` must run though no event came; None when only an event can change anything."""
        times = [lost.until for lost in self.fleet.lost.values()]
        times += [gateway.lost_until for gateway in self.requests.gateways.values() if gateway.lost_until is not None]
        if self.queue.num_requests:
            # Whatever `now` is: the last decision may have been made a moment before that time, this question after.
            if self._recovering:
                times.append(self.recovered_at)
            if self.fleet.grace_end is not None:
                times.append(self.fleet.grace_end)
        while self._deadlines and not self._is_queued(self._deadlines[0][2]):
            heapq.heappop(self._deadlines)
        if self._deadlines:
            times.append(self._deadlines[0][0])
        return min(times, default=None)

    def _place(self, now: float) -> None:
        placement = Placement(self.fleet.workers, self.settings)
        with closing(self.queue.heads()) as heads:
            for lane, request in heads:
                if placement.exhausted:
                    return
                choice = placement.choose(lane, request)
                if choice.worker is None:
                    self._refuse(request, refusals.too_large(request, placement.workers))
                elif choice.reason is not None:
                    self._offer(request, choice, now)

    def _offer(self, request: Request, choice: Choice, now: float) -> None:
        worker, reason = choice.worker, choice.reason
        assert worker is not None
        assert reason is not None
        self.queue.remove(request)
        tier = worker.tier(request.adapter) if request.adapter else None
        remaining = None if request.deadline is None else request.deadline - now
        request.state = RequestState.OFFERED
        worker.add(request)
        request.offer_seq = worker.command(Offer(request, remaining, reason, tier, now - request.arrived))
        self.requests.answer(request, Placed(request.key, worker.worker_id, tier))

    def _expire(self, now: float) -> None:
        for worker in self.fleet.take_expired(now):
            for request in list(worker.requests.values()):
                if _unconfirmed(request, worker) and not request.aborted:
                    self.requests.answer(request, Refused(request.key, refusals.worker_lost(worker, self.settings)))
                self._forget(request)
        for gateway in list(self.requests.gateways.values()):
            if gateway.lost_until is not None and gateway.lost_until <= now:
                for request in list(gateway.requests.values()):
                    self._abort(request)
                del self.requests.gateways[gateway.gateway_id]
        while self._deadlines and self._deadlines[0][0] <= now:
            request = heapq.heappop(self._deadlines)[2]
            if self._is_queued(request):
                self._refuse(request, refusals.deadline_passed(request, now))
        if (grace_end := self.fleet.grace_end) is not None and grace_end <= now:
            waited = self.fleet.seconds_without_worker(now)
            for request in sorted(self.queue, key=lambda request: request.order_key):
                self._refuse(request, refusals.no_worker(waited, self.settings))

    # Transitions.

    def _refusal(self, request: Request) -> Refusal | None:
        """Why the request must not enter the queue; None when it may."""
        limit = self.fleet.identity.max_context_tokens if self.fleet.identity else 0
        if limit and request.context_tokens > limit:
            return refusals.context_too_long(request, limit)
        workers = self.fleet.workers
        if workers and not any(worker.could_ever_take(request) for worker in workers):
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
            self._abort(known)
        else:
            self.requests.claim(known, request.gateway_id)
            self.requests.answer(known, Placed(known.key, known.worker_id))

    def _accept(self, request: Request) -> None:
        request.order_key = next(self._order_keys)
        self.requests.add(request)
        self._enqueue(request)

    def _enqueue(self, request: Request) -> None:
        """Into the queue, with the order key it has."""
        request.state, request.worker_id = RequestState.QUEUED, ""
        self.queue.push(request)
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, next(self._deadline_numbers), request))
        if len(self._deadlines) > 2 * self.queue.num_requests + _SPARE_DEADLINES:
            self._deadlines = [entry for entry in self._deadlines if self._is_queued(entry[2])]
            heapq.heapify(self._deadlines)

    def _is_queued(self, request: Request) -> bool:
        return request.state is RequestState.QUEUED and self.requests.get(request.key) is request

    def _abort(self, request: Request) -> None:
        if request.state is RequestState.QUEUED:
            self.queue.remove(request)
            self._forget(request)
        elif not request.aborted:
            request.aborted = True
            if worker := self.fleet.get(request.worker_id):
                worker.command(Abort(request.key, request.abort_cause))

    def _refuse(self, request: Request, refusal: Refusal) -> None:
        """For a queued request."""
        self.queue.remove(request)
        self.requests.answer(request, Refused(request.key, refusal))
        self._forget(request)

    def _forget(self, request: Request) -> None:
        """It is neither queued nor on a worker any more."""
        self.requests.remove(request)
        if request.successor:
            self._accept(request.successor)

    def _advance(self, worker: Worker, progress: Progress) -> bool:
        """Takes in the state of one attempt; False when nothing follows from it."""
        request = worker.requests.get(progress.key)
        if request is None:
            return False
        if isinstance(progress.state, RequestState):
            return worker.advance(request, progress.state, progress.computed_tokens)
        worker.remove(request)
        if progress.state is Ending.REVOKED and not request.aborted and request.payload is not None:
            self._enqueue(request)
        else:
            self._forget(request)
        return True

    def _adopt(self, worker: Worker, progress: Progress, request: Request | None, now: float) -> None:
        """A sequence that the worker has when it registers; `request` is what is known of it from before."""
        if not isinstance(progress.state, RequestState):
            if request:
                self._forget(request)
            return
        known, newest = self.requests.get(progress.key), self.requests.newest(progress.key)
        if request is None and known and self._is_queued(known):
            request = known
            self.queue.remove(request)
            self.requests.answer(request, Placed(request.key, worker.worker_id))
        elif request is None and (known or (newest and newest.key.attempt > progress.key.attempt)):
            # Another worker has the attempt, or a newer one exists.
            worker.command(Abort(progress.key))
            return
        if request is None:
            request = self._unknown_request(progress, now)
            self.requests.add(request)
        request.state, request.computed_tokens = progress.state, max(progress.computed_tokens, request.computed_tokens)
        worker.add(request)
        if request.aborted:
            worker.command(Abort(request.key, request.abort_cause))

    def _unknown_request(self, progress: Progress, now: float) -> Request:
        """Stands for a sequence that an earlier scheduler placed: its prompt and its limit are not known here."""
        return Request(
            key=progress.key,
            gateway_id="",
            adapter=progress.adapter,
            adapter_bytes=0,
            prompt_tokens=progress.computed_tokens,
            max_tokens=self.settings.in_flight_tokens,
            order_key=next(self._order_keys),
            arrived=now,
        )


def _unconfirmed(request: Request, worker: Worker) -> bool:
    """Whether the worker may never have heard of the request."""
    return request.state is RequestState.OFFERED and request.offer_seq > worker.applied_seq
