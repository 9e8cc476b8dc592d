"""The sentences that say where a request is, and why."""

import pytest

from scheduler.core.explain import explain
from scheduler.core.model import Ending, RequestState
from tests.scheduler.core_fakes import key, make_request, progress, with_worker


def test_explain_says_where_a_request_is() -> None:
    scheduler = with_worker(num_pages=8, policy="fcfs")
    assert explain(scheduler, "r0", 0.0) == [
        "No request r0 is queued or on a worker: it was never submitted here, or ended long ago."
    ]
    scheduler.submit(make_request("r0", max_tokens=24), 0.0)
    scheduler.submit(make_request("r1", max_tokens=24), 0.0)
    scheduler.submit(make_request("r2", prompt=1, max_tokens=1), 0.0)
    scheduler.schedule(0.0)
    assert explain(scheduler, "r0", 0.0) == [
        "Attempt 0 of request r0 was offered to worker w0 as command 1; the worker has confirmed 0."
    ]
    assert explain(scheduler, "r1", 2.0) == [
        "Attempt 0 of request r1 has been queued for 2.0 s, at position 1 of 2 by arrival; the policy is fcfs.",
        "It waits in the line of worker w0, which holds 2 requests and about 0.0 s of work, 0.0 s of it of its tenant.",
        "Worker w0 cannot take it now: its requests would need 16 pages at their peak and its pool has 8.",
    ]
    sentences = {
        RequestState.WAITING: "waits in the local queue of worker w0 with 0 others",
        RequestState.RUNNING: "runs on worker w0 with at least 8 tokens computed",
        RequestState.PREEMPTED: "gave its pages back on worker w0 and waits there to go on",
    }
    for state, sentence in sentences.items():
        scheduler.report("w0", progress("r0", state, 8), 0.0)
        assert explain(scheduler, "r0", 0.0) == [f"Attempt 0 of request r0 {sentence}."]
    scheduler.abort(key("r0"))
    assert explain(scheduler, "r0", 0.0)[0].endswith("; it was aborted and the worker has not confirmed that.")
    scheduler.worker_lost("w0", 0.0)
    assert explain(scheduler, "r0", 0.0) == ["Attempt 0 of request r0 was on worker w0, whose stream is lost."]
    assert explain(scheduler, "r1", 0.0)[1] == "No worker is ready."


@pytest.mark.parametrize(
    ("num_pages", "max_sequences", "settings", "sentence"),
    [
        (64, 1, {}, "it would have 2 sequences and its limit is 1"),
        (64, 16, {"max_waiting_requests": 1}, "1 requests wait there and the limit is 1"),
        (64, 16, {"recovery_seconds": 9.0}, "This scheduler has just started"),
    ],
)
def test_explain_names_the_limit(num_pages: int, max_sequences: int, settings: dict[str, float], sentence: str) -> None:
    scheduler = with_worker(num_pages, max_sequences, **settings)
    for index in range(2):
        scheduler.submit(make_request(f"r{index}"), 0.0)
    scheduler.schedule(0.0)
    assert any(sentence in text for text in explain(scheduler, "r1", 0.0))


def test_the_timelines_of_the_last_requests_are_kept_and_no_more() -> None:
    scheduler = with_worker(num_pages=64, history_requests=3)
    for index in range(5):
        scheduler.submit(make_request(f"r{index}"), 0.0)
        scheduler.schedule(1.0)
        scheduler.report("w0", progress(f"r{index}", Ending.FINISHED), 3.0)
    assert len(scheduler.life.history) == 3
    assert explain(scheduler, "r1", 9.0)[0].startswith("No request r1 is queued")
    assert explain(scheduler, "r2", 9.0) == [
        "Attempt 0 of request r2 finished on worker w0 after 3.000 s with 0 tokens: 1.000 s in the scheduler's queue."
    ]
