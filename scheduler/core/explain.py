"""Says in sentences where a request is, and why."""

from scheduler.core.model import Request, RequestState
from scheduler.core.scheduler import Scheduler

MAX_WORKERS = 8


def explain(scheduler: Scheduler, request_id: str, now: float) -> list[str]:
    """One or more sentences for each known attempt; ages are seconds before `now`."""
    attempts = scheduler.requests.attempts(request_id)
    if not attempts:
        return [f"No request {request_id} is queued or on a worker: it was never submitted here, or it has ended."]
    sentences = []
    for request in attempts:
        if request.state is RequestState.QUEUED:
            sentences += _explain_queued(scheduler, request, now)
        else:
            sentences.append(_explain_placed(scheduler, request))
    return sentences


def _name(request: Request) -> str:
    return f"Attempt {request.key.attempt} of request {request.key.request_id}"


def _explain_queued(scheduler: Scheduler, request: Request, now: float) -> list[str]:
    queue, position = scheduler.queue, scheduler.queue.position(request)
    sentences = [
        f"{_name(request)} has been queued for {now - request.arrived:.1f} s, at position {position} of "
        f"{queue.num_requests}."
    ]
    if now < scheduler.recovered_at:
        sentences.append("This scheduler has just started and waits for the workers to say what they have.")
    ready = [worker for worker in scheduler.fleet.workers if not worker.draining]
    if not ready:
        sentences.append("No worker is ready.")
    for worker in ready[:MAX_WORKERS]:
        obstacle = worker.obstacle(request)
        if not obstacle and position > 1:
            obstacle = "it has room, but older requests go first or its load is not low enough to fetch the adapter"
        if obstacle:
            sentences.append(f"Worker {worker.worker_id} does not get it now: {obstacle}.")
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
