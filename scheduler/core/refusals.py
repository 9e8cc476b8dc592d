"""The reasons for which a request is refused, each with the limit and the value. Sizes are pages, tokens, seconds."""

from collections.abc import Collection

from scheduler.core.commands import Refusal
from scheduler.core.model import Request
from scheduler.core.settings import Settings
from scheduler.core.worker import Worker


def context_too_long(request: Request, limit: int) -> Refusal:
    needed = request.context_tokens
    return Refusal(
        "INVALID_ARGUMENT",
        "CONTEXT_LENGTH_EXCEEDED",
        f"the prompt has {request.prompt_tokens} tokens and max_tokens is {request.max_tokens}, {needed} together; "
        f"the model's context is {limit} tokens",
        {"limit_tokens": str(limit), "requested_tokens": str(needed)},
    )


def too_large(request: Request, workers: Collection[Worker]) -> Refusal:
    """For a request that no worker could ever take; `workers` is not empty."""
    worker = max(workers, key=lambda worker: (worker.capacity.num_pages, worker.worker_id))
    pool, limit = worker.capacity.num_pages, worker.capacity.max_sequences
    adapter, context = worker.room.adapter_pages(request), worker.room.full_pages(request)
    metadata = {"pool_pages": str(pool), "adapter_pages": str(adapter), "context_pages": str(context)}
    if adapter > pool:
        message = f"the adapter needs {adapter} pages; the largest pool has {pool}"
        return Refusal("FAILED_PRECONDITION", "ADAPTER_TOO_LARGE", message, metadata)
    if request.num_outputs > limit:
        message = f"the request asks for {request.num_outputs} outputs; a worker runs {limit} sequences at once"
        return Refusal("FAILED_PRECONDITION", "REQUEST_TOO_LARGE", message, metadata)
    message = (
        f"the request needs {context} pages for {request.context_tokens} tokens of context and {adapter} for its "
        f"adapter; the largest pool has {pool}"
    )
    return Refusal("FAILED_PRECONDITION", "REQUEST_TOO_LARGE", message, metadata)


def queue_full(num_requests: int, num_tokens: int, settings: Settings) -> Refusal:
    """`num_requests` and `num_tokens` are what the queue would hold with the request."""
    return Refusal(
        "RESOURCE_EXHAUSTED",
        "QUEUE_FULL",
        f"the queue would hold {num_requests} requests and {num_tokens} tokens; its limits are "
        f"{settings.max_queued_requests} requests and {settings.max_queued_tokens} tokens",
        {"limit_requests": str(settings.max_queued_requests), "limit_tokens": str(settings.max_queued_tokens)},
        settings.retry_after_seconds,
    )


def no_worker(waited_seconds: float, settings: Settings) -> Refusal:
    return Refusal(
        "UNAVAILABLE",
        "NO_WORKER",
        f"no worker has been ready for {waited_seconds:.1f} s; the grace is {settings.worker_grace_seconds:g} s",
        {"grace_seconds": f"{settings.worker_grace_seconds:g}"},
        settings.retry_after_seconds,
    )


def worker_lost(worker: Worker, settings: Settings) -> Refusal:
    return Refusal(
        "UNAVAILABLE",
        "WORKER_LOST",
        f"worker {worker.worker_id} was lost before it confirmed the request and has not come back for "
        f"{settings.worker_grace_seconds:g} s",
        {"worker_id": worker.worker_id},
        settings.retry_after_seconds,
    )


def lost(request: Request, now: float, settings: Settings) -> Refusal:
    """For a queued request whose deadline has passed, or whose first token would come too late."""
    waited = now - request.arrived
    if request.deadline is not None and request.deadline <= now:
        return Refusal(
            "DEADLINE_EXCEEDED",
            "DEADLINE_EXCEEDED",
            f"the deadline passed after {waited:.3f} s in the queue",
            {"queued_seconds": f"{waited:.3f}"},
        )
    objective = request.slo_seconds or 0.0
    return Refusal(
        "RESOURCE_EXHAUSTED",
        "SLO_MISSED",
        f"after {waited:.3f} s in the queue the first token cannot come within {objective:g} s any more",
        {"queued_seconds": f"{waited:.3f}", "ttft_slo_seconds": f"{objective:g}"},
        settings.retry_after_seconds,
    )


def hopeless(request: Request, shortage_seconds: float, settings: Settings) -> Refusal:
    """For a newcomer whose first token would come `shortage_seconds` too late."""
    objective = request.slo_seconds or 0.0
    expected = objective + shortage_seconds
    return Refusal(
        "RESOURCE_EXHAUSTED",
        "SLO_UNATTAINABLE",
        f"the first token is expected after {expected:.3f} s; the objective is {objective:g} s",
        {"expected_seconds": f"{expected:.3f}", "ttft_slo_seconds": f"{objective:g}"},
        max(settings.retry_after_seconds, shortage_seconds),
    )
