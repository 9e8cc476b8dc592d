"""A tenant far below its share of a worker need not wait until one of the sequences that run there ends."""

from collections.abc import Mapping

from scheduler.core.model import Request, RequestState
from scheduler.core.settings import Settings
from scheduler.core.worker import Worker


def may_be_below_share(worker: Worker, settings: Settings) -> bool:
    """Whether some tenant could be so far below its share that `make_room` would do something. Cheap."""
    weights = settings.tenant_weights
    most = max(weights.values(), default=1.0)
    share = sum(worker.tenants.values()) * max(most, 1.0) / (_total(worker.tenants, weights) or 1.0)
    return settings.preempt_below_share * share >= 1


def make_room(worker: Worker, now: float, settings: Settings) -> tuple[Request, int] | None:
    """Has a request preempted so that one of the worker's line can be taken; at most one in `preempt_seconds`.

    A tenant's share of a worker is the part of the sequences there that its weight is of the weights of all who have
    some, the newcomer's tenant among them. The newcomer is the first of the heads of the line whose tenant has at most
    `preempt_below_share` of its share, the newcomer included. Whoever has most for its weight must have its share
    without what is preempted: the newest of its running requests. That one keeps its tokens, and its full pages as a
    prefix; it is the first to come back.

    Returns the newcomer and an order key that goes before whatever of the other tenant waits on the worker; None when
    nobody yields now, and then `worker.wake_at` says when somebody might.
    """
    due = worker.preempted_at + settings.preempt_seconds
    if due > now:
        worker.wake_at = due if worker.wake_at is None else min(worker.wake_at, due)
        return None
    found = _exchange(worker, settings)
    if found is None:
        return None
    head, victim = found
    worker.preempted_at = now
    worker.displace(victim)
    waiting = [
        request.order_key or 0
        for request in worker.requests.values()
        if request.tenant == victim.tenant and request.state is not RequestState.RUNNING
    ]
    return head, min([victim.order_key or 0, *waiting]) - 1


def _exchange(worker: Worker, settings: Settings) -> tuple[Request, Request] | None:
    """Who should run, and instead of whom."""
    weights = settings.tenant_weights
    running = dict(worker.tenants)
    for key in worker.displaced.keys() - worker.rotated.keys():
        running[key.tenant] -= worker.requests[key].num_outputs
    tenant = max(running, key=lambda name: (running[name] / weights.get(name, 1.0), name))
    victim = _newest(worker, tenant)
    if victim is None:
        return None
    for head in worker.line.candidates(settings.lookahead_lanes):
        counts = {head.tenant: 0} | running
        of_weight = sum(counts.values()) / _total(counts, weights)
        share = of_weight * weights.get(head.tenant, 1.0)
        if counts[head.tenant] + head.num_outputs > settings.preempt_below_share * share:
            continue
        if counts[tenant] - victim.num_outputs < of_weight * weights.get(tenant, 1.0):
            continue
        if worker.room.fits_adapter(head) and worker.can_take_instead_of(head, victim):
            return head, victim
    return None


def _newest(worker: Worker, tenant: str) -> Request | None:
    running = [
        request
        for key, request in worker.requests.items()
        if request.tenant == tenant
        and request.state is RequestState.RUNNING
        and key not in worker.rotated
        and key not in worker.displaced
        and not request.aborted
    ]
    return max(running, key=lambda request: request.order_key or 0, default=None)


def _total(tenants: Mapping[str, int], weights: Mapping[str, float]) -> float:
    return sum(weights.get(tenant, 1.0) for tenant in tenants) if weights else float(len(tenants))
