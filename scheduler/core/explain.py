"""Says in sentences where a request is, and why, or how it went."""

from scheduler.core.history import Ended
from scheduler.core.model import Request, RequestState
from scheduler.core.scheduler import Scheduler
from scheduler.core.settings import Settings
from scheduler.core.worker import Worker

MAX_WORKERS = 8


def explain(scheduler: Scheduler, request_id: str, now: float) -> list[str]:
    """One or more sentences for each attempt that is known or ended lately; ages are seconds before `now`."""
    sentences = [_explain_ended(ended) for ended in scheduler.life.history.of(request_id)]
    for request in scheduler.requests.attempts(request_id):
        if request.state is RequestState.QUEUED:
            sentences += _explain_queued(scheduler, request, now)
        else:
            sentences.append(_explain_placed(scheduler, request))
    unknown = f"No request {request_id} is queued or on a worker: it was never submitted here, or ended long ago."
    return sentences or [unknown]


def _name(request: Request) -> str:
    return f"Attempt {request.key.attempt} of request {request.key.request_id}"


def _explain_ended(ended: Ended) -> str:
    name = f"Attempt {ended.key.attempt} of request {ended.key.request_id}"
    parts = [f"{ended.offered:.3f} s in the scheduler's queue"]
    if ended.phases is not None:
        parts += [
            f"{ended.phases.queue_seconds:.3f} s in the worker's",
            f"{ended.phases.load_seconds:.3f} s until its adapter was loaded",
            f"{ended.phases.prefill_seconds:.3f} s of prefill",
            f"{ended.phases.decode_seconds:.3f} s of decode",
        ]
    if ended.preemptions:
        parts.append(f"{ended.preempted_seconds:.3f} s of it without pages after {ended.preemptions} preemptions")
    return (
        f"{name} {ended.how} on worker {ended.worker_id} after {ended.ended:.3f} s with {ended.generated_tokens} "
        f"tokens: {', '.join(parts)}."
    )


def _explain_queued(scheduler: Scheduler, request: Request, now: float) -> list[str]:
    queue, position = scheduler.queue, scheduler.queue.position(request)
    sentences = [
        f"{_name(request)} has been queued for {now - request.arrived:.1f} s, at position {position} of "
        f"{queue.num_requests} by arrival; the policy is {scheduler.settings.policy}."
    ]
    if not scheduler.life.assigning:
        sentences.append("This scheduler has just started and waits for the workers to say what they have.")
    ready = scheduler.life.placement.workers
    if not ready:
        sentences.append("No worker is ready.")
    if home := scheduler.fleet.get(request.line_id or ""):
        line = home.line
        sentences.append(
            f"It waits in the line of worker {home.worker_id}, which holds {line.num_requests} requests and about "
            f"{line.cost_seconds:.1f} s of work, {line.cost_of(request.tenant):.1f} s of it of its tenant."
        )
    for worker in ready[:MAX_WORKERS]:
        if why := obstacle(worker, request, scheduler.settings):
            sentences.append(f"Worker {worker.worker_id} cannot take it now: {why}.")
        else:
            sentences.append(f"Worker {worker.worker_id} has room for it, but others go first there.")
    if len(ready) > MAX_WORKERS:
        sentences.append(f"{len(ready) - MAX_WORKERS} more workers are not listed.")
    return sentences


def _explain_placed(scheduler: Scheduler, request: Request) -> str:
    worker = scheduler.fleet.get(request.worker_id)
    if worker is None or request.key not in worker.requests:
        return f"{_name(request)} was on worker {request.worker_id}, whose stream is lost."
    if request.state is RequestState.OFFERED:
        where = (
            f"was offered to worker {worker.worker_id} as command {request.offer_seq}; the worker has confirmed "
            f"{worker.applied_seq}"
        )
    elif request.state is RequestState.RUNNING:
        where = f"runs on worker {worker.worker_id} with at least {request.computed_tokens} tokens computed"
    elif request.state is RequestState.PREEMPTED:
        where = f"gave its pages back on worker {worker.worker_id} and waits there to go on"
    else:
        where = f"waits in the local queue of worker {worker.worker_id} with {worker.num_waiting - 1} others"
    aborted = "; it was aborted and the worker has not confirmed that" if request.aborted else ""
    return f"{_name(request)} {where}{aborted}."


def obstacle(worker: Worker, request: Request, settings: Settings) -> str:
    """Why the worker cannot be given the request now, with the limit and the value; empty when it can."""
    capacity, room = worker.capacity, worker.room
    sequences = room.num_sequences + request.num_outputs
    if worker.draining:
        return "it is draining"
    if not room.could_ever_fit(request):
        return "its pool is too small"
    if sequences > capacity.max_sequences:
        return f"it would have {sequences} sequences and its limit is {capacity.max_sequences}"
    if worker.num_waiting >= settings.max_waiting_requests:
        return f"{worker.num_waiting} requests wait there and the limit is {settings.max_waiting_requests}"
    if not room.fits_adapter(request):
        return (
            f"adapters in use would need {room.adapter_pages_with(request)} pages and may have "
            f"{settings.adapter_pool_share:g} of the pool's {capacity.num_pages}; they take turns"
        )
    if not worker.can_take(request):
        peak = room.peak_pages_with(request)
        return f"its requests would need {peak} pages at their peak and its pool has {capacity.num_pages}"
    return ""
