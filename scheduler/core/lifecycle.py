"""What can happen to a request, from its arrival to its end; queue, worker and policy are told of each transition."""

import itertools

from scheduler.core import refusals
from scheduler.core.backlog import NO_WORKER, Backlog
from scheduler.core.commands import Abort, Offer, Placed, Refusal, Refused, Revoke
from scheduler.core.costs import CostModel
from scheduler.core.deadlines import Deadlines, Estimator, is_queued
from scheduler.core.fleet import Fleet
from scheduler.core.history import History
from scheduler.core.lengths import OutputLengths
from scheduler.core.model import Ending, Progress, Reason, Request, RequestState, Tier
from scheduler.core.placement import Placement
from scheduler.core.policies.protocol import Policy
from scheduler.core.requests import RequestTable
from scheduler.core.settings import Settings
from scheduler.core.worker import Worker

# Order keys of a later epoch are greater than those of an earlier one, whose sequences may still run.
_ORDER_KEYS_PER_EPOCH = 1 << 20


class Lifecycle:
    """Requests and where they are. Every `now` is in seconds on the caller's clock."""

    def __init__(self, settings: Settings, epoch: int, fleet: Fleet, policy: Policy, costs: CostModel) -> None:
        """`costs` is the model of a step that prices service."""
        self.costs = costs
        self.policy = policy
        self.lengths = OutputLengths(settings.output_quantile, settings.output_window, settings.output_min_samples)
        self.queue = Backlog(self.policy)
        self.requests = RequestTable()
        self.history = History(settings.history_requests)
        self.deadlines = Deadlines(is_queued)
        self.placement = Placement(fleet, settings)
        self.estimator = Estimator(self.policy, settings)
        # Workers that something happened to, in the order of the events.
        self.touched: dict[str, None] = {}
        # Whether requests may wait for a certain worker; not before all workers had time to come back.
        self.assigning = False
        self._settings = settings
        self._fleet = fleet
        self._numbers = itertools.count(1)
        self._order_keys = itertools.count(epoch * _ORDER_KEYS_PER_EPOCH)

    def touch(self, worker_id: str) -> None:
        """Something happened to the worker or its line: it must be looked at."""
        self.touched[worker_id] = None

    # Into the queue.

    def accept(self, request: Request) -> None:
        """A new attempt, whatever was known under its key."""
        request.number = next(self._numbers)
        request.slo_seconds = self._settings.slo_seconds(request.tenant, request.slo_seconds)
        self.requests.add(request)
        self.enqueue(request)

    def enqueue(self, request: Request) -> None:
        """Into the queue, with the place in time that it has."""
        request.state, request.worker_id = RequestState.QUEUED, ""
        request.expected_tokens = self.lengths.expected(request.adapter, request.max_tokens, request.output_tokens)
        request.cost = self.costs.service_seconds(request.prompt_tokens, request.num_outputs * request.expected_tokens)
        assigning = self.assigning and bool(self.placement.workers)
        worker = self.placement.choose(request) if assigning else None
        refusal = self._settle(request, worker) if assigning else None
        self.queue.push(request, NO_WORKER if worker is None else worker.worker_id)
        if refusal is not None:
            self.refuse(request, refusal)
            return
        self._expect(request, worker)
        self.touch(request.line_id or NO_WORKER)

    def assign(self, requests: list[Request]) -> None:
        """Finds a worker's line for requests that wait for none, if workers are there."""
        if not self.assigning or not self.placement.workers:
            return
        for request in requests:
            worker = self.placement.choose(request)
            if refusal := self._settle(request, worker):
                self.refuse(request, refusal)
            elif worker is not None:
                self.queue.move(request, worker.worker_id)
                self._expect(request, worker)
                self.touch(worker.worker_id)

    def _settle(self, request: Request, worker: Worker | None) -> Refusal | None:
        """Why the request should not wait for the worker that was chosen for it; None when it should."""
        if worker is None:
            return refusals.too_large(request, self.placement.workers)
        if not request.offer_seq and (shortage := self.estimator.shortage(request, worker)):
            return refusals.hopeless(request, shortage, self._settings)
        return None

    def open_line(self, worker: Worker) -> None:
        """The worker has come; what waits for its earlier registration, or for no worker, finds a line anew."""
        self.queue.end_line(worker.worker_id)
        self.queue.open_line(worker.worker_id, worker.line)
        self.assign_waiting()

    def assign_waiting(self) -> None:
        """Finds lines for all that wait for no worker: one has come."""
        self.assign(self.queue.requests_of(NO_WORKER))

    def end_line(self, worker_id: str) -> None:
        """The worker takes nothing more: what waits for it waits for others."""
        self.assign(self.queue.end_line(worker_id))

    def drop_lost(self, now: float) -> None:
        """Refuses queued requests that cannot make it any more."""
        for request in self.deadlines.take_due(now):
            lost_at = self.estimator.lost_at(request, self._fleet.get(request.line_id or ""))
            if lost_at is not None and lost_at > now:
                self.deadlines.push(request, lost_at, self.queue.num_requests)
            else:
                self.refuse(request, refusals.lost(request, now, self._settings))

    def _expect(self, request: Request, worker: Worker | None) -> None:
        lost_at = self.estimator.lost_at(request, worker)
        if lost_at is not None:
            self.deadlines.push(request, lost_at, self.queue.num_requests)

    # Onto a worker.

    def offer(self, request: Request, worker: Worker, now: float, order_key: int | None = None) -> None:
        """Gives a queued request to a worker, with the next place in its order or the one given."""
        self.policy.started(request)
        self.queue.remove(request)
        if request.order_key is None:
            request.order_key = next(self._order_keys)
        if (key := worker.in_use.front_key(request.adapter, order_key)) is not None:
            request.order_key = min(request.order_key, key)
        tier = worker.tier(request.adapter) if request.adapter else None
        reason = self._reason(request, worker)
        request.state = RequestState.OFFERED
        request.timeline.offered = now
        worker.add(request, now)
        worker.remember_prefix(request)
        remaining = None if request.deadline is None else request.deadline - now
        request.offer_seq = worker.command(
            Offer(request, remaining, reason, tier, now - request.arrived, request.order_key)
        )
        self.requests.answer(request, Placed(request.key, worker.worker_id, tier))

    def adopt(self, request: Request | None, progress: Progress, worker: Worker, now: float) -> None:
        """The worker has it; `request` is what is known of it, None when that is nothing."""
        assert isinstance(progress.state, RequestState)
        if request is None:
            request = self._stranger(progress, now)
            self.requests.add(request)
            self.policy.started(request)
        elif is_queued(request):
            self.policy.started(request)
            self.queue.remove(request)
            self.requests.answer(request, Placed(request.key, worker.worker_id))
        request.state = progress.state
        request.computed_tokens = max(progress.computed_tokens, request.computed_tokens)
        request.generated_tokens = max(progress.generated_tokens, request.generated_tokens)
        worker.add(request, now)
        if request.aborted:
            worker.command(Abort(request.key, request.abort_cause))

    def advance(self, worker: Worker, progress: Progress, now: float) -> bool:
        """Takes in the state of one attempt; False when nothing follows from it."""
        request = worker.requests.get(progress.key)
        if request is None:
            return False
        if isinstance(progress.state, RequestState):
            output = max(request.output_tokens, progress.generated_tokens // request.num_outputs)
            expected = self.lengths.expected(request.adapter, request.max_tokens, output)
            request.timeline.reach(progress.state, now)
            changed = worker.advance(request, progress, expected, now)
            if changed:
                self.policy.served(request)
            return changed
        worker.remove(request)
        request.computed_tokens = max(progress.computed_tokens, request.computed_tokens)
        request.generated_tokens = max(progress.generated_tokens, request.generated_tokens)
        if progress.state is Ending.REVOKED and not request.aborted and request.payload is not None:
            self.enqueue(request)
            self.policy.ended(request, returned=True)
            return True
        if progress.complete:
            self.lengths.add(request.adapter, request.output_tokens)
        self._end(request, progress.state.value, now, progress, worker.worker_id)
        return True

    def take_back(self, worker: Worker) -> None:
        """Asks for what the worker has not admitted: others are ready sooner."""
        for request in worker.requests.values():
            if request.state in (RequestState.OFFERED, RequestState.WAITING) and not request.aborted:
                worker.command(Revoke(request.key))

    def _reason(self, request: Request, worker: Worker) -> Reason:
        if not request.adapter or worker.uses(request.adapter) or worker.tier(request.adapter) is Tier.PAGES:
            return Reason.RESIDENT
        if worker.tier(request.adapter) is Tier.HOST:
            return Reason.HOST_HIT
        return Reason.SPILL if self.placement.is_elsewhere(request.adapter, worker) else Reason.COLD

    def _stranger(self, progress: Progress, now: float) -> Request:
        """Stands for a sequence that an earlier scheduler placed: its prompt and its limit are not known here."""
        return Request(
            key=progress.key,
            gateway_id="",
            adapter=progress.adapter,
            adapter_bytes=0,
            prompt_tokens=progress.computed_tokens,
            max_tokens=self._settings.in_flight_tokens,
            # Nothing it had before is charged for.
            delivered_tokens=min(progress.generated_tokens, self._settings.in_flight_tokens),
            generated_tokens=progress.generated_tokens,
            number=next(self._numbers),
            order_key=next(self._order_keys),
            arrived=now,
        )

    # To the end.

    def abort(self, request: Request) -> None:
        """Queued: at once. On a worker: when the worker says so."""
        if request.state is RequestState.QUEUED:
            self.touch(request.line_id or NO_WORKER)
            self.queue.remove(request)
            self._forget(request)
        elif not request.aborted:
            request.aborted = True
            if worker := self._fleet.get(request.worker_id):
                worker.command(Abort(request.key, request.abort_cause))

    def refuse(self, request: Request, refusal: Refusal) -> None:
        """For a queued request."""
        self.touch(request.line_id or NO_WORKER)
        self.queue.remove(request)
        self.requests.answer(request, Refused(request.key, refusal))
        self._forget(request)

    def lose(self, request: Request, now: float) -> None:
        """It was on a worker, and is nowhere any more."""
        self._end(request, "lost", now, None, request.worker_id)

    def requeue(self, request: Request) -> None:
        """It was offered to a worker that never heard of it, or gave it back."""
        if request.payload is None:
            # Placed by a scheduler before this one: there is nothing to offer again.
            self._end(request, "lost", request.arrived, None, request.worker_id)
            return
        self.enqueue(request)
        self.policy.ended(request, returned=True)

    def _end(self, request: Request, how: str, now: float, progress: Progress | None, worker_id: str) -> None:
        self.policy.ended(request, returned=False)
        self.history.add(request, how, now, progress.phases if progress else None, worker_id)
        self._forget(request)

    def _forget(self, request: Request) -> None:
        """It is neither queued nor on a worker any more."""
        self.requests.remove(request)
        if request.successor:
            self.accept(request.successor)
