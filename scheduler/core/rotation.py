"""Turns of adapters when not all that are asked for fit: each runs for a while, nobody waits for ever."""

from scheduler.core.commands import Reorder
from scheduler.core.model import Request, RequestState
from scheduler.core.settings import Settings
from scheduler.core.worker import Worker


def rotate(worker: Worker, head: Request | None, now: float, settings: Settings) -> int | None:
    """Ends the turn of an adapter in favour of whoever has waited for longer than `rotation_seconds` for a place.

    That is `head`, the first request of the worker's line, when only its adapter keeps it from being taken; or the
    request that was rotated out longest ago. The adapters that have been in use longest yield, as many as are in the
    way, once they have been for `rotation_seconds`: their requests give their pages back and keep their tokens. Returns
    the order key that goes before all of theirs; None when nobody yields now, and then `worker.wake_at` says when
    somebody might.
    """
    waiting = _longest_waiting(worker, head)
    if waiting is None:
        return None
    request, since = waiting
    yielding = _yielding(worker, request, at_home=request is not head)
    if not yielding:
        return None
    due = max(since, yielding[-1][0]) + settings.rotation_seconds
    if due > now:
        worker.wake_at = due if worker.wake_at is None else min(worker.wake_at, due)
        return None
    order_key = _end_turns(worker, {adapter for _, adapter in yielding})
    if order_key is None:
        return None
    if request is not head:
        for other in worker.requests.values():
            if other.adapter == request.adapter and other.order_key is not None and other.order_key > order_key:
                other.order_key = order_key
                worker.command(Reorder(other.key, order_key))
    return order_key


def _longest_waiting(worker: Worker, head: Request | None) -> tuple[Request, float] | None:
    """Who waits for a place, and since when."""
    waits = [
        (request.timeline.preempted, request)
        for key in worker.rotated
        if (request := worker.requests[key]).timeline.preempted is not None
    ]
    if head is not None and not worker.room.fits_adapter(head):
        waits.append((head.arrived, head))
    if not waits:
        return None
    since, request = min(waits, key=lambda wait: (wait[0] or 0.0, wait[1].number))
    return request, since or 0.0


def _yielding(worker: Worker, request: Request, *, at_home: bool) -> list[tuple[float, str]]:
    """The adapters in use that must yield to the request's, those longest in use first, each with when its turn began.

    One for what was rotated out (`at_home`); as many as make room within the share of the pool for a newcomer.
    """
    turns = sorted((began, adapter) for adapter, began in worker.in_use.turns.items() if adapter != request.adapter)
    if at_home:
        return turns[:1]
    excess = worker.room.excess_adapter_pages(request)
    for index, (_, adapter) in enumerate(turns):
        excess -= worker.in_use.pages_of(adapter)
        if excess <= 0:
            return turns[: index + 1]
    return turns


def _end_turns(worker: Worker, adapters: set[str]) -> int | None:
    """Rotates the adapters' requests out; returns a key before all of theirs, None when none of them runs."""
    victims = [
        request
        for key, request in worker.requests.items()
        if request.adapter in adapters and key not in worker.rotated and not request.aborted
    ]
    if not any(request.state is RequestState.RUNNING for request in victims):
        return None
    for request in victims:
        worker.rotate_out(request)
    return min(request.order_key or 0 for request in victims) - 1
