"""A tenant far below its share of a full worker: who yields to it, when, and when nobody does."""

from typing import Any

import pytest

from scheduler.core.commands import Action, Offer, Preempt
from scheduler.core.model import Ending, Key, Progress, Report, Request, RequestState
from scheduler.core.scheduler import Scheduler
from tests.scheduler.core_fakes import SimulatedWorker, make_hello, make_request, make_scheduler


def of(tenant: str, name: str, adapter: str = "", **fields: Any) -> Request:
    made = make_request(name, adapter, **fields)
    made.key = made.key._replace(tenant=tenant)
    return made


def given(scheduler: Scheduler, now: float = 0.0) -> list[Action]:
    return [command.action for command in scheduler.schedule(now).commands.get("w0", [])]


def names(actions: list[Action]) -> list[str]:
    """What happened, as "preempt NAME" and "offer NAME"."""
    found = []
    for action in actions:
        assert isinstance(action, Preempt | Offer)
        key = action.key if isinstance(action, Preempt) else action.request.key
        found.append(f"{type(action).__name__.lower()} {key.request_id}")
    return found


def running(scheduler: Scheduler, *keys: Key) -> None:
    worker = scheduler.fleet.workers[0]
    states = tuple(Progress(key, RequestState.RUNNING, computed_tokens=9, generated_tokens=1) for key in keys)
    scheduler.report("w0", Report(worker.epoch, worker.last_seq, states), 0.0)


def flooded(num_sequences: int = 4, pages: int = 1000, tenants: str = "ffff", **settings: Any) -> Scheduler:
    """A worker whose sequences are all taken, by tenant `f` unless `tenants` says otherwise; two more of f wait."""
    scheduler = make_scheduler(step_target_seconds=0.0, **settings)
    scheduler.register(make_hello(num_pages=pages, max_sequences=num_sequences), 0.0)
    requests = [of(tenant, f"{tenant}{index}") for index, tenant in enumerate(tenants)]
    for request in requests:
        scheduler.submit(request, 0.0)
        given(scheduler)
    running(scheduler, *(request.key for request in requests))
    for index in (8, 9):
        scheduler.submit(of("f", f"f{index}"), 0.0)
    assert given(scheduler) == []
    return scheduler


def test_the_newest_of_the_tenant_above_its_share_yields_and_its_place_is_kept() -> None:
    scheduler = flooded()
    scheduler.submit(of("quiet", "q"), 0.0)
    preempt, offer = given(scheduler)
    assert names([preempt, offer]) == ["preempt f3", "offer q"]
    f3 = scheduler.requests.get(Key("f3", 0, "f"))
    assert f3 is not None
    assert f3.order_key is not None
    assert isinstance(offer, Offer)
    assert offer.order_key == f3.order_key - 1
    scheduler.report("w0", Report(progress=(Progress(Key("q", 0, "quiet"), Ending.FINISHED),)), 0.0)
    assert given(scheduler) == []
    running(scheduler, f3.key)
    scheduler.report("w0", Report(progress=(Progress(Key("f0", 0, "f"), Ending.FINISHED),)), 0.0)
    assert names(given(scheduler)) == ["offer f8"]


def test_a_worker_preempts_once_in_a_while_and_says_when_it_may_again() -> None:
    scheduler = flooded(preempt_seconds=0.2, num_sequences=8, tenants="ffffffff")
    scheduler.submit(of("q", "q1"), 0.0)
    assert names(given(scheduler)) == ["preempt f7", "offer q1"]
    scheduler.submit(of("r", "r1"), 0.05)
    assert names(given(scheduler, 0.05)) == []
    assert scheduler.next_wakeup() == 0.2
    assert names(given(scheduler, 0.2)) == ["preempt f6", "offer r1"]


def test_nobody_yields_to_a_tenant_that_has_half_its_share() -> None:
    """Two of the four are its share: with one, and the newcomer, it would have all of it."""
    scheduler = flooded(tenants="fffq")
    scheduler.submit(of("q", "q1"), 0.0)
    assert given(scheduler) == []


def test_nobody_yields_who_would_have_less_than_its_share() -> None:
    """Four tenants with one each, and a fifth: nobody has more than 4/5."""
    scheduler = flooded(tenants="abcd", preempt_below_share=1.0)
    scheduler.submit(of("q", "q1"), 0.0)
    assert given(scheduler) == []


def test_nobody_yields_who_has_just_its_share() -> None:
    """Of four sequences two tenants have two each and a third tenant comes: without one they would have 1 < 4/3."""
    scheduler = flooded(tenants="ffgg", preempt_below_share=1.0)
    scheduler.submit(of("q", "q1"), 0.0)
    assert given(scheduler) == []


@pytest.mark.parametrize(("weight", "yields"), [(1.0, True), (4.0, False)])
def test_weights_count(weight: float, yields: bool) -> None:
    """Of six sequences a fifth is q's share beside a tenant of weight 4: one is more than half of that."""
    scheduler = flooded(tenants="ffffff", num_sequences=6, tenant_weights={"f": weight})
    scheduler.submit(of("q", "q1"), 0.0)
    assert names(given(scheduler)) == (["preempt f5", "offer q1"] if yields else [])


def test_pages_may_be_what_is_short() -> None:
    """Four requests of 16 tokens take all 16 pages; there would be room for twelve more sequences."""
    scheduler = flooded(num_sequences=16, pages=16)
    scheduler.submit(of("q", "large", prompt=40), 0.0)
    assert given(scheduler) == []
    scheduler.abort(Key("large", 0, "q"))
    scheduler.submit(of("q", "q"), 0.0)
    assert names(given(scheduler)) == ["preempt f3", "offer q"]


@pytest.mark.parametrize("policy", ["vtc", "cluster", "fcfs", "lcfs", "abort"])
def test_other_policies_preempt_nobody(policy: str) -> None:
    scheduler = flooded(policy=policy)
    scheduler.submit(of("q", "q"), 0.0)
    assert given(scheduler) == []


def longest_wait(preempt_seconds: float) -> int:
    """Steps until a request of two tokens of the quiet tenant had ended at most, beside a flood of long requests."""
    scheduler = make_scheduler(preempt_seconds=preempt_seconds, session_grace_seconds=0.0)
    worker = SimulatedWorker("w0", num_pages=400, max_sequences=8)
    worker.epoch = scheduler.register(worker.hello(), 0.0)
    longest, finished = 0, 0
    for step in range(1200):
        now = 0.05 * step
        flood = sum(key.tenant == "f" for key in (*worker.sequences, *(queued.key for queued in scheduler.queue)))
        for index in range(20 - flood):
            scheduler.submit(of("f", f"f{step}-{index}", max_tokens=40), now)
        if step % 10 == 0:
            scheduler.submit(of("q", f"q{step}", max_tokens=2), now)
        worker.inbox += [(worker.epoch, command) for command in scheduler.schedule(now).commands.get("w0", [])]
        ended = worker.step()
        finished += sum(key.tenant == "f" for key in ended)
        longest = max([longest, *(step - int(key.request_id[1:]) for key in ended if key.tenant == "q")])
        scheduler.report("w0", worker.report(), now)
    # The flood loses no more than what the quiet tenant gets.
    assert finished >= 0.9 * 1200 * 8 / 40
    return longest


def test_a_quiet_tenant_does_not_wait_for_a_sequence_of_the_flood_to_end() -> None:
    assert longest_wait(0.2) <= 3
    # The negative control: without preemption it waits for one of the flood's sequences.
    assert longest_wait(1e9) >= 20
