"""Objectives for the first token: who is refused, when, and that no work is spent on the lost."""

from typing import Any

import pytest

from scheduler.core.commands import Offer, Refused
from scheduler.core.costs import StepFacts
from scheduler.core.model import Ending, Progress, Report, RequestState, Residency, Tier
from scheduler.core.scheduler import Scheduler
from tests.scheduler.core_fakes import answers, key, make_hello, make_request, make_scheduler, progress, refusal


def taught(**settings: Any) -> Scheduler:
    """A worker with one sequence at once. A step takes 10 ms, a prompt token 1 ms, an output token 10 ms."""
    scheduler = make_scheduler(step_target_seconds=0.0, **settings)
    scheduler.register(make_hello(num_pages=10_000, max_sequences=1), 0.0)
    for index in range(400):
        prefill, decode, adapters = index * 37 % 300, index % 5, index % 3
        seconds = 0.01 + 0.001 * prefill + 0.01 * decode + 0.0001 * adapters
        scheduler.report("w0", Report(costs=StepFacts(1, seconds, prefill, decode, adapters)), 0.0)
    scheduler.submit(make_request("running", prompt=10, max_tokens=10), 0.0)
    scheduler.schedule(0.0)
    scheduler.report("w0", progress("running", RequestState.RUNNING, 11), 0.0)
    return scheduler


def refusals(scheduler: Scheduler, now: float) -> dict[str, str]:
    """Request id -> reason."""
    return {
        answer.key.request_id: answer.refusal.reason
        for answer in answers(scheduler, now)
        if isinstance(answer, Refused)
    }


@pytest.mark.parametrize(("objective", "accepted"), [(1.5, True), (0.5, False)])
def test_what_cannot_make_it_is_refused_on_arrival(objective: float, accepted: bool) -> None:
    """Nine requests of 10 + 10 tokens are 9 x 0.11 s in line before it, and its own prefill 0.02 s."""
    scheduler = taught(policy="fcfs")
    for index in range(9):
        scheduler.submit(make_request(f"r{index}", prompt=10, max_tokens=10), 0.0)
    scheduler.schedule(0.0)
    scheduler.submit(make_request("r", prompt=10, max_tokens=10, slo_seconds=objective), 0.0)
    if accepted:
        assert refusals(scheduler, 0.0) == {}
        return
    refused = refusal(scheduler)
    assert (refused.code, refused.reason) == ("RESOURCE_EXHAUSTED", "SLO_UNATTAINABLE")
    assert float(refused.metadata["expected_seconds"]) == pytest.approx(1.01, abs=0.03)
    assert refused.retry_after_seconds == 1.0


def test_a_tenant_with_its_own_share_is_not_refused_for_anothers_queue() -> None:
    """The same line under `fair`: of two tenants the quiet one waits for twice its own work at most, which is none."""
    scheduler = taught(policy="fair")
    for index in range(90):
        scheduler.submit(make_request(f"r{index}", prompt=10, max_tokens=10), 0.0)
    scheduler.schedule(0.0)
    quiet = make_request("quiet", prompt=10, max_tokens=10, slo_seconds=0.5)
    quiet.key = quiet.key._replace(tenant="quiet")
    scheduler.submit(quiet, 0.0)
    assert refusals(scheduler, 0.0) == {}


def test_the_time_to_bring_a_cold_adapter_counts() -> None:
    """100 MB at 100 MB/s from the store and 1 GB/s into pages are 1.1 s; resident elsewhere is no help here."""
    scheduler = taught(fetch_bytes_per_second=1e8, load_bytes_per_second=1e9)
    for adapter, tier in (("host", Tier.HOST), ("pages", Tier.PAGES)):
        scheduler.fleet.workers[0].move_adapters([Residency(adapter, tier, 1)])
        scheduler.fleet.workers[0].residents[adapter] = Residency(adapter, tier, 1)
    for adapter in ("cold", "host", "pages"):
        scheduler.submit(make_request(adapter, adapter, adapter_bytes=100_000, prompt=10, slo_seconds=1.0), 0.0)
    worker = scheduler.fleet.workers[0]
    times = [
        scheduler.life.estimator.load_seconds(make_request("x", adapter, adapter_bytes=10**8), worker)
        for adapter in ("cold", "host", "pages")
    ]
    assert times == [1.1, 0.1, 0.0]


def test_what_has_become_hopeless_in_the_queue_is_never_offered() -> None:
    """Objective 1 s, prefill 0.11 s: lost 0.89 s after its arrival, though a place becomes free at that moment."""
    scheduler = taught()
    scheduler.submit(make_request("r", prompt=100, max_tokens=10, slo_seconds=1.0), 0.0)
    assert refusals(scheduler, 0.0) == {}
    lost_at = scheduler.next_wakeup()
    assert lost_at == pytest.approx(0.88, abs=0.02)
    assert lost_at is not None
    # Alone in its step it would take 10 ms less.
    scheduler.report("w0", progress("running", Ending.FINISHED), lost_at)
    decisions = scheduler.schedule(lost_at + 0.02)
    assert decisions.commands == {}
    (answer,) = decisions.answers["g"]
    assert isinstance(answer, Refused)
    assert (answer.refusal.code, answer.refusal.reason) == ("RESOURCE_EXHAUSTED", "SLO_MISSED")
    assert answer.refusal.retry_after_seconds == 1.0


def test_s_loras_rule_takes_the_same_time_for_every_prefill() -> None:
    """Age plus 0.5 s over 6 s: at 5.5 s and not before; nothing is refused on arrival."""
    scheduler = taught(policy="abort", ttft_slo_seconds=6.0)
    for index in range(200):
        scheduler.submit(make_request(f"r{index}", prompt=10, max_tokens=10), 0.0)
    assert refusals(scheduler, 5.4) == {}
    assert scheduler.next_wakeup() == 5.5
    missed = refusals(scheduler, 5.5)
    assert set(missed.values()) == {"SLO_MISSED"}
    assert len(missed) == 200


def test_a_tenants_class_is_its_objective_and_the_request_may_ask_for_another() -> None:
    scheduler = taught(tenant_ttft_slo_seconds={"default": 3.0})
    for name, asked in (("class", None), ("own", 2.0)):
        scheduler.submit(make_request(name, prompt=1, slo_seconds=asked), 0.0)
    objectives = [request.slo_seconds for request in sorted(scheduler.queue, key=lambda request: request.number)]
    assert objectives == [3.0, 2.0]


def test_a_worker_nothing_is_known_of_refuses_nobody() -> None:
    scheduler = make_scheduler()
    scheduler.register(make_hello(max_sequences=1), 0.0)
    for index in range(50):
        scheduler.submit(make_request(f"r{index}", slo_seconds=0.001), 0.0)
    scheduler.schedule(0.0)
    assert scheduler.queue.num_requests == 49


def test_one_that_waits_for_a_better_worker_now_is_not_refused_by_the_time_of_the_old() -> None:
    """Lost on a cold worker at 0.5 s; another with the adapter comes, and it goes there instead."""
    scheduler = taught(fetch_bytes_per_second=200.0)
    request = make_request("r", "a", prompt=10, max_tokens=10, slo_seconds=2.0)
    scheduler.submit(request, 0.0)
    scheduler.worker_lost("w0", 0.1)
    scheduler.register(make_hello("w1", resident=(Residency("a", Tier.PAGES, 2),)), 0.1)
    given = [c.action for c in scheduler.schedule(0.2).commands.get("w1", [])]
    assert [action.request.key for action in given if isinstance(action, Offer)] == [key("r")]
    report = Report(progress=(Progress(key("r"), RequestState.RUNNING),))
    scheduler.report("w1", report, 0.3)
    assert refusals(scheduler, 3.0) == {"running": "WORKER_LOST"} or refusals(scheduler, 3.0) == {}
