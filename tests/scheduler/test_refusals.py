"""What the scheduler refuses, when, and in which words."""

import pytest

from scheduler.core.model import Ending, Report, Request
from tests.scheduler.core_fakes import (
    answers,
    commands,
    key,
    make_hello,
    make_request,
    make_scheduler,
    progress,
    refusal,
    with_worker,
)


@pytest.mark.parametrize(
    ("request_", "code", "reason", "message"),
    [
        pytest.param(
            make_request("r", prompt=4000, max_tokens=97),
            "INVALID_ARGUMENT",
            "CONTEXT_LENGTH_EXCEEDED",
            "the prompt has 4000 tokens and max_tokens is 97, 4097 together; the model's context is 4096 tokens",
            id="context",
        ),
        pytest.param(
            make_request("r", "a", prompt=100, max_tokens=149),
            "FAILED_PRECONDITION",
            "REQUEST_TOO_LARGE",
            "the request needs 63 pages for 249 tokens of context and 2 for its adapter; the largest pool has 64",
            id="too large",
        ),
        pytest.param(
            make_request("r", "a", adapter_bytes=3201),
            "FAILED_PRECONDITION",
            "ADAPTER_TOO_LARGE",
            "the adapter needs 65 pages; the largest pool has 64",
            id="adapter",
        ),
        pytest.param(
            make_request("r", prompt=1, max_tokens=1, num_outputs=17),
            "FAILED_PRECONDITION",
            "REQUEST_TOO_LARGE",
            "the request asks for 17 outputs; a worker runs 16 sequences at once",
            id="outputs",
        ),
    ],
)
def test_what_can_never_run_is_refused_at_once(request_: Request, code: str, reason: str, message: str) -> None:
    scheduler = with_worker()
    scheduler.submit(request_, 0.0)
    refused = refusal(scheduler)
    assert (refused.code, refused.reason, refused.message) == (code, reason, message)
    assert refused.retry_after_seconds is None


def test_what_fits_exactly_is_offered() -> None:
    scheduler = with_worker()
    scheduler.submit(make_request("r", "a", prompt=100, max_tokens=148), 0.0)
    assert commands(scheduler) == [(1, "offer", key("r"))]


def test_a_queued_request_is_refused_when_the_workers_that_come_are_too_small() -> None:
    scheduler = make_scheduler()
    scheduler.submit(make_request("r"), 0.0)
    assert answers(scheduler) == []
    scheduler.register(make_hello(num_pages=3), 0.0)
    assert refusal(scheduler).reason == "REQUEST_TOO_LARGE"


@pytest.mark.parametrize("limit", [{"max_queued_requests": 2}, {"max_queued_tokens": 32}], ids=str)
def test_a_full_queue_refuses_with_a_hint(limit: dict[str, int]) -> None:
    scheduler = make_scheduler(**limit)
    for index in range(3):
        scheduler.submit(make_request(f"r{index}"), 0.0)
    refused = refusal(scheduler)
    assert (refused.code, refused.reason) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
    assert "3 requests and 48 tokens" in refused.message
    assert refused.retry_after_seconds == 1.0


def test_requests_wait_for_a_first_worker_as_long_as_the_grace() -> None:
    scheduler = make_scheduler()
    scheduler.submit(make_request("r0"), 0.0)
    assert answers(scheduler, 0.0) == []
    assert scheduler.next_wakeup() == 2.0
    assert answers(scheduler, 1.9) == []
    assert refusal(scheduler, 2.0).reason == "NO_WORKER"
    scheduler.submit(make_request("r1"), 3.0)
    assert "no worker has been ready for 3.0 s; the grace is 2 s" in refusal(scheduler, 3.0).message


def test_the_grace_begins_when_the_last_worker_drains() -> None:
    scheduler = with_worker()
    scheduler.report("w0", Report(draining=True), 10.0)
    scheduler.submit(make_request("r"), 10.0)
    assert answers(scheduler, 11.9) == []
    assert refusal(scheduler, 12.0).reason == "NO_WORKER"


def test_a_deadline_counts_only_while_the_request_is_queued() -> None:
    scheduler = with_worker(num_pages=8)
    scheduler.submit(make_request("r0", max_tokens=24, deadline=5.0), 0.0)
    scheduler.submit(make_request("r1", max_tokens=24, deadline=3.0), 0.0)
    assert [answer.key for answer in answers(scheduler)] == [key("r0")]
    assert scheduler.next_wakeup() == 3.0
    refused = refusal(scheduler, 3.0)
    assert (refused.code, refused.message) == ("DEADLINE_EXCEEDED", "the deadline passed after 3.000 s in the queue")
    assert scheduler.next_wakeup() is None
    assert answers(scheduler, 6.0) == []


def test_deadlines_of_placed_requests_are_not_kept() -> None:
    scheduler = with_worker()
    for index in range(1000):
        scheduler.submit(make_request(f"r{index}", deadline=1e6 + index), 0.0)
        scheduler.schedule(0.0)
        scheduler.report("w0", progress(f"r{index}", Ending.FINISHED), 0.0)
    assert scheduler.next_wakeup() is None
