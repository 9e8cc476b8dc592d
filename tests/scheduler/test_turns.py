"""Adapters that take turns, hints to workers, and how long steps and answers get."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from scheduler.core.commands import Action, Offer, Preempt, Prefetch, Reorder, StepBudget
from scheduler.core.costs import StepFacts
from scheduler.core.lengths import OutputLengths
from scheduler.core.model import Ending, Progress, Report, RequestState
from scheduler.core.scheduler import Scheduler
from tests.scheduler.core_fakes import SimulatedWorker, key, make_hello, make_request, make_scheduler, progress

# Two pages of each adapter: three fit into half of the pool.
POOL_PAGES = 12


def actions(scheduler: Scheduler, now: float, worker_id: str = "w0") -> list[Action]:
    return [command.action for command in scheduler.schedule(now).commands.get(worker_id, [])]


def offered(commands: list[Action]) -> list[str]:
    return [action.request.key.request_id for action in commands if isinstance(action, Offer)]


def crowded(**changes: Any) -> Scheduler:
    """A worker that runs adapters a, b and c since times 0, 1 and 2, and may run no fourth."""
    scheduler = make_scheduler(rotation_seconds=2.0, **changes)
    scheduler.register(make_hello(num_pages=POOL_PAGES), 0.0)
    for index, adapter in enumerate("abc"):
        scheduler.submit(make_request(adapter, adapter, prompt=2, max_tokens=2), float(index))
        assert offered(actions(scheduler, float(index))) == [adapter]
        scheduler.report("w0", progress(adapter, RequestState.RUNNING, 2), float(index))
    return scheduler


def test_an_adapter_beyond_the_share_of_the_pool_waits_and_others_in_use_do_not() -> None:
    scheduler = crowded()
    scheduler.submit(make_request("d", "d", prompt=2, max_tokens=2), 2.0)
    scheduler.submit(make_request("a2", "a", prompt=2, max_tokens=2), 2.0)
    assert offered(actions(scheduler, 2.0)) == ["a2"]


def test_the_adapter_that_was_longest_in_use_yields_to_one_that_waited_as_long() -> None:
    scheduler = crowded()
    scheduler.submit(make_request("d", "d", prompt=2, max_tokens=2), 2.5)
    actions(scheduler, 2.5)
    assert scheduler.next_wakeup() == 4.5
    assert actions(scheduler, 4.4) == []
    preempted, offer = actions(scheduler, 4.5)
    assert preempted == Preempt(key("a"))
    assert isinstance(offer, Offer)
    a = scheduler.requests.get(key("a"))
    assert a is not None
    assert a.order_key is not None
    assert (offer.request.key, offer.order_key) == (key("d"), a.order_key - 1)


def test_what_had_to_yield_comes_back_when_it_has_waited_as_long() -> None:
    """The turns: d for a at 4.5, a for b, b for c, and then c for d, whose key is smaller: c gets one before it."""
    scheduler = crowded()
    scheduler.submit(make_request("d", "d", prompt=2, max_tokens=2), 2.5)
    actions(scheduler, 2.5)
    actions(scheduler, 4.5)
    worker, now = scheduler.fleet.workers[0], 4.5
    for back, yields in (("a", "b"), ("b", "c"), ("c", "d")):
        states = [Progress(key(back), RequestState.PREEMPTED)]
        states += [
            Progress(key(name), RequestState.RUNNING, name, 2) for name in "abcd" if key(name) not in worker.rotated
        ]
        scheduler.report("w0", Report(worker.epoch, worker.last_seq, tuple(states)), now)
        assert actions(scheduler, now + 1.9) == []
        now += 2.0
        preempted, *reordered = actions(scheduler, now)
        assert preempted == Preempt(key(yields))
        running = (Progress(key(back), RequestState.RUNNING, back, 2),)
        scheduler.report("w0", Report(worker.epoch, worker.last_seq, running), now)
    d = scheduler.requests.get(key("d"))
    assert d is not None
    assert d.order_key is not None
    assert reordered == [Reorder(key("c"), d.order_key - 1)]
    a = scheduler.requests.get(key("a"))
    assert a is not None
    assert a.timeline.preemptions == 1
    assert a.timeline.preempted_seconds == pytest.approx(2.0)


def longest_waits(
    rotation_seconds: float,
    *,
    policy: str = "cluster",
    cluster_wait_seconds: float = 1e9,
    num_adapters: int = 12,
    lengths: Sequence[int] = (20,),
) -> dict[str, float]:
    """Adapters with endless requests, three of them at a time, those in use first: seconds that each was out.

    `lengths` are the answers' in tokens, in turn.
    """
    scheduler = make_scheduler(
        policy=policy,
        max_batch_adapters=1,
        cluster_wait_seconds=cluster_wait_seconds,
        adapter_pool_share=0.1,
        rotation_seconds=rotation_seconds,
    )
    worker = SimulatedWorker("w0", num_pages=60, max_sequences=8)
    worker.epoch = scheduler.register(worker.hello(), 0.0)
    now, last_run = 0.0, dict.fromkeys((f"x{index:02}" for index in range(num_adapters)), 0.0)
    longest = dict.fromkeys(last_run, 0.0)
    for step in range(1200):
        now = step * 0.05
        queued = {request.adapter for request in scheduler.queue}
        for adapter in sorted(last_run.keys() - queued):
            tokens = lengths[(step + int(adapter[1:])) % len(lengths)]
            scheduler.submit(make_request(f"{adapter}-{step}", adapter, prompt=2, max_tokens=tokens), now)
        worker.inbox += [(worker.epoch, command) for command in scheduler.schedule(now).commands.get("w0", [])]
        worker.step()
        for sequence in worker.sequences.values():
            adapter = sequence.request.adapter
            longest[adapter] = max(longest[adapter], now - last_run[adapter])
            last_run[adapter] = now if sequence.running else last_run[adapter]
        scheduler.report("w0", worker.report(), now)
    return {adapter: max(longest[adapter], now - last_run[adapter]) for adapter in last_run}


def test_every_adapter_is_served_though_few_fit_at_once() -> None:
    """At worst each of the others has a turn of a second before it is there again, and nearly as long to begin."""
    assert max(longest_waits(1.0).values()) <= 2 * 11 * 1.0


@settings(max_examples=10)
@example("fair", 6, [4])
@given(
    st.sampled_from(["cluster", "fair", "vtc"]),
    st.integers(4, 12),
    st.lists(st.integers(4, 40), min_size=1, max_size=6),
)
def test_the_wait_of_an_adapter_is_bounded_whatever_is_asked(
    policy: str, num_adapters: int, lengths: list[int]
) -> None:
    """With the default bound on how long adapters in use may go first; without it the example waits for 50 s."""
    waits = longest_waits(1.0, policy=policy, cluster_wait_seconds=0.5, num_adapters=num_adapters, lengths=lengths)
    assert max(waits.values()) <= 2 * (num_adapters - 1) * 1.0


def test_without_turns_some_adapters_are_never_served() -> None:
    """The negative control of the test above."""
    assert max(longest_waits(1e9).values()) >= 50.0


def test_adapters_of_the_next_heads_are_fetched_ahead_once() -> None:
    scheduler = make_scheduler(max_prefetches=2)
    scheduler.register(make_hello(max_sequences=1), 0.0)
    for adapter in "abcd":
        scheduler.submit(make_request(adapter, adapter), 0.0)
    first = actions(scheduler, 0.0)
    assert offered(first) == ["a"]
    assert [action.adapter for action in first if isinstance(action, Prefetch)] == ["b", "c"]
    scheduler.report("w0", progress("a", Ending.FINISHED), 0.0)
    second = actions(scheduler, 0.0)
    assert offered(second) == ["b"]
    assert [action.adapter for action in second if isinstance(action, Prefetch)] == ["d"]


def paced() -> Scheduler:
    scheduler = make_scheduler(step_target_seconds=0.2, min_step_tokens=16)
    hello = make_hello()
    capacity = type(hello.capacity)(64, 50, 4, 16, max_step_tokens=512)
    scheduler.register(type(hello)("w0", capacity, hello.identity), 0.0)
    return scheduler


def run(scheduler: Scheduler, request_id: str, *, whole: bool) -> None:
    scheduler.submit(make_request(request_id, whole=whole), 0.0)
    assert offered(actions(scheduler, 0.0)) == [request_id]
    scheduler.report("w0", progress(request_id, RequestState.RUNNING), 0.0)


def budgets(scheduler: Scheduler) -> list[int]:
    """What it is told while it reports 200 steps."""
    told = []
    for index in range(200):
        prefill = index * 37 % 300
        facts = StepFacts(1, 0.01 + 0.001 * prefill, prefill, index % 5, index % 3)
        scheduler.report("w0", Report(costs=facts), 0.0)
        told += [action.tokens for action in actions(scheduler, 0.0) if isinstance(action, StepBudget)]
    return told


def test_a_worker_is_told_how_many_tokens_a_step_has_time_for() -> None:
    """A step takes 10 ms, a prompt token 1 ms: 0.2 s are 190 tokens of prompt."""
    scheduler = paced()
    run(scheduler, "stream", whole=False)
    told = budgets(scheduler)
    assert told
    assert told[-1] == pytest.approx(190, rel=0.25)


def test_while_nobody_reads_tokens_as_they_come_steps_have_all_the_tokens_a_worker_can() -> None:
    scheduler = paced()
    run(scheduler, "one", whole=True)
    assert budgets(scheduler) == []
    run(scheduler, "stream", whole=False)
    assert budgets(scheduler)[-1] < 300
    scheduler.report("w0", progress("stream", Ending.FINISHED), 0.0)
    assert budgets(scheduler) == [512]


def test_no_target_means_no_budget() -> None:
    scheduler = make_scheduler(step_target_seconds=0.0)
    hello = make_hello()
    capacity = type(hello.capacity)(64, 50, 4, 16, max_step_tokens=512)
    scheduler.register(type(hello)("w0", capacity, hello.identity), 0.0)
    for _ in range(64):
        scheduler.report("w0", Report(costs=StepFacts(1, 1.0, 10, 1, 1)), 0.0)
    assert actions(scheduler, 0.0) == []


def test_an_adapters_answers_tell_how_long_the_next_will_be() -> None:
    lengths = OutputLengths(quantile=0.5, window=4, min_samples=3)
    for tokens in (10, 20):
        lengths.add("a", tokens)
    assert lengths.expected("a", 100) == 100
    lengths.add("a", 30)
    assert [lengths.expected("a", 100, generated) for generated in (0, 10, 20, 30)] == [20, 30, 30, 100]
    assert lengths.expected("a", 15) == 15
    assert lengths.expected("b", 100) == 100
    for tokens in (50, 50):
        lengths.add("a", tokens)
    assert lengths.expected("a", 100) == 50


def test_answers_that_were_short_let_more_requests_in() -> None:
    """A pool of 16 pages: two requests of 8 pages at the worst, four of the 4 pages that they will need."""
    for known, expected in ((False, 2), (True, 4)):
        scheduler = make_scheduler()
        if known:
            for _ in range(16):
                scheduler.life.lengths.add("", 8)
        scheduler.register(make_hello(num_pages=16), 0.0)
        for index in range(6):
            scheduler.submit(make_request(f"r{index}", prompt=7, max_tokens=24), 0.0)
        assert len(offered(actions(scheduler, 0.0))) == expected
