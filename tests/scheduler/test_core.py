"""One behaviour of the core at a time."""

import pytest

from scheduler.core.commands import Placed
from scheduler.core.identity import IdentityMismatchError
from scheduler.core.intake import ReportGapError
from scheduler.core.model import (
    Capacity,
    Ending,
    Identity,
    Progress,
    Report,
    RequestState,
    Residency,
    Tier,
)
from scheduler.core.scheduler import Scheduler
from scheduler.core.settings import Settings
from tests.scheduler.core_fakes import (
    IDENTITY,
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

# Order.


def test_order_keys_grow_with_arrival_and_stay_when_a_request_is_given_back() -> None:
    scheduler = with_worker()
    requests = [make_request(f"r{index}") for index in range(3)]
    for request in requests:
        scheduler.submit(request, 0.0)
    scheduler.schedule(0.0)
    order_keys = [request.order_key or 0 for request in requests]
    assert order_keys == sorted(set(order_keys))
    scheduler.report("w0", Report(progress=tuple(Progress(key(f"r{n}"), Ending.REVOKED) for n in (2, 0))), 0.0)
    assert commands(scheduler) == [(4, "offer", key("r0")), (5, "offer", key("r2"))]
    assert [request.order_key for request in requests] == order_keys


def test_order_keys_of_a_later_scheduler_are_greater() -> None:
    settings = Settings(recovery_seconds=0.0, max_waiting_requests=2000)
    older, newer = (Scheduler(settings, epoch, 0.0) for epoch in (1000, 1001))
    last, first = make_request("last"), make_request("first")
    for index in range(1000):
        older.submit(make_request(f"r{index}"), 0.0)
    older.submit(last, 0.0)
    newer.submit(first, 0.0)
    for scheduler in (older, newer):
        scheduler.register(make_hello(num_pages=10_000, max_sequences=2000), 0.0)
        while scheduler.schedule(0.0).incomplete:
            pass
    assert last.order_key is not None
    assert first.order_key is not None
    assert last.order_key < first.order_key


# Commands and reports.


def test_commands_are_numbered_from_one_in_each_registration() -> None:
    scheduler = with_worker()
    scheduler.submit(make_request("r0"), 0.0)
    scheduler.abort(key("r0"))
    scheduler.submit(make_request("r1"), 0.0)
    assert commands(scheduler) == [(1, "offer", key("r1"))]
    scheduler.abort(key("r1"))
    scheduler.abort(key("r1"))
    assert commands(scheduler) == [(2, "abort", key("r1"))]
    scheduler.register(make_hello(), 0.0)
    scheduler.submit(make_request("r2"), 0.0)
    assert commands(scheduler) == [(1, "offer", key("r2"))]


def test_acknowledgements_of_earlier_registrations_are_ignored() -> None:
    scheduler = with_worker()
    scheduler.submit(make_request("r0"), 0.0)
    scheduler.schedule(0.0)
    worker = scheduler.fleet.get("w0")
    assert worker is not None
    for epoch, applied_seq, expected in [(worker.epoch - 1, 1, 0), (worker.epoch, 1, 1)]:
        scheduler.report("w0", Report(epoch, applied_seq), 0.0)
        assert worker.applied_seq == expected


def test_a_report_says_whether_anything_can_follow_from_it() -> None:
    scheduler = with_worker()
    scheduler.submit(make_request("r0"), 0.0)
    scheduler.schedule(0.0)
    running = progress("r0", RequestState.RUNNING, 4)
    assert scheduler.report("w0", running, 0.0)
    assert not scheduler.report("w0", running, 0.0)
    assert not scheduler.report("w0", progress("unknown", Ending.FINISHED), 0.0)
    assert scheduler.report("w0", progress("r0", Ending.FAILED), 0.0)
    assert not scheduler.report("unknown", progress("r0", Ending.FAILED), 0.0)


def test_pages_are_free_again_when_a_request_has_ended() -> None:
    scheduler = with_worker(num_pages=8)
    for index in range(2):
        scheduler.submit(make_request(f"r{index}", max_tokens=24), 0.0)
    assert commands(scheduler) == [(1, "offer", key("r0"))]
    scheduler.report("w0", progress("r0", RequestState.RUNNING, 31), 0.0)
    assert commands(scheduler) == []
    scheduler.report("w0", progress("r0", Ending.FINISHED), 0.0)
    assert commands(scheduler) == [(2, "offer", key("r1"))]


def test_a_preempted_request_keeps_its_estimate() -> None:
    scheduler = with_worker()
    request = make_request("r0", prompt=10, max_tokens=20)
    scheduler.submit(request, 0.0)
    scheduler.schedule(0.0)
    scheduler.report("w0", progress("r0", RequestState.RUNNING, 25), 0.0)
    scheduler.report("w0", progress("r0", RequestState.PREEMPTED, 0), 0.0)
    assert (request.held_tokens, request.coming_tokens) == (26, 4)


def test_delivered_tokens_of_an_earlier_attempt_are_output() -> None:
    request = make_request("r0", prompt=10, max_tokens=20, delivered_tokens=5, attempt=1)
    assert (request.held_tokens, request.coming_tokens) == (16, 14)


def test_changes_of_residency_are_applied_once_and_in_order() -> None:
    scheduler = with_worker()
    worker = scheduler.fleet.get("w0")
    assert worker is not None
    changes = (Residency("a", Tier.PAGES, 2, 5), Residency("b", Tier.HOST, 0, 6), Residency("a", Tier.STORE, 0, 7))
    assert scheduler.report("w0", Report(residency=changes), 0.0)
    scheduler.report("w0", Report(residency=changes[:1]), 0.0)
    assert {adapter: residency.tier for adapter, residency in worker.residents.items()} == {"b": Tier.HOST}
    with pytest.raises(ReportGapError, match="w0"):
        scheduler.report("w0", Report(residency=(Residency("c", Tier.PAGES, 1, 9),)), 0.0)


# Attempts, gateways, and workers that come and go.


def test_a_newer_attempt_ends_the_older_ones_and_is_not_followed_by_them() -> None:
    scheduler = with_worker()
    scheduler.submit(make_request("r", attempt=0), 0.0)
    scheduler.schedule(0.0)
    scheduler.submit(make_request("r", attempt=1), 0.0)
    assert commands(scheduler) == [(2, "abort", key("r", 0)), (3, "offer", key("r", 1))]
    scheduler.submit(make_request("r", attempt=0), 0.0)
    scheduler.report("w0", progress("r", Ending.FINISHED), 0.0)
    scheduler.submit(make_request("r", attempt=0), 0.0)
    assert commands(scheduler) == []


def test_a_key_that_is_used_again_waits_until_its_last_use_is_over() -> None:
    scheduler = with_worker()
    scheduler.submit(make_request("r"), 0.0)
    scheduler.schedule(0.0)
    again = make_request("r", prompt=3)
    scheduler.submit(again, 1.0)
    assert commands(scheduler, 1.0) == [(2, "abort", key("r"))]
    scheduler.report("w0", progress("r", Ending.FINISHED), 1.0)
    assert commands(scheduler, 1.0) == [(3, "offer", key("r"))]
    assert scheduler.requests.get(key("r")) is again


def test_a_gateway_that_comes_back_is_told_where_its_request_is() -> None:
    scheduler = with_worker()
    scheduler.submit(make_request("r"), 0.0)
    assert answers(scheduler) == [Placed(key("r"), "w0")]
    scheduler.gateway_lost("g", 1.0)
    scheduler.gateway_connected("g")
    scheduler.submit(make_request("r"), 1.1)
    assert answers(scheduler, 1.1) == [Placed(key("r"), "w0")]
    assert commands(scheduler, 9.0) == []


def test_the_requests_of_a_gateway_that_stays_away_are_dropped_and_aborted() -> None:
    scheduler = with_worker(num_pages=8)
    for index in range(2):
        scheduler.submit(make_request(f"r{index}", max_tokens=24), 0.0)
    scheduler.schedule(0.0)
    scheduler.gateway_lost("g", 1.0)
    assert scheduler.queue.num_requests == 0
    assert scheduler.next_wakeup() == 1.5
    assert commands(scheduler, 1.4) == []
    assert commands(scheduler, 1.5) == [(2, "abort", key("r0"))]


def test_a_request_that_came_back_from_a_worker_outlives_a_short_loss_of_its_gateway() -> None:
    """The gateway was told that it is placed, so it does not submit it again."""
    scheduler = with_worker()
    scheduler.submit(make_request("r"), 0.0)
    scheduler.schedule(0.0)
    scheduler.report("w0", progress("r", Ending.REVOKED), 1.0)
    scheduler.gateway_lost("g", 1.0)
    scheduler.gateway_connected("g")
    assert answers(scheduler, 1.0) == [Placed(key("r"), "w0")]


def test_a_lost_workers_requests_are_forgotten_and_aborts_for_them_ignored() -> None:
    scheduler = with_worker()
    scheduler.submit(make_request("r"), 0.0)
    scheduler.schedule(0.0)
    scheduler.report("w0", progress("r", RequestState.RUNNING), 0.0)
    scheduler.worker_lost("w0", 1.0)
    scheduler.abort(key("r"))
    assert scheduler.next_wakeup() == 3.0
    assert answers(scheduler, 3.0) == []
    assert scheduler.requests.get(key("r")) is None
    scheduler.abort(key("r"))


def test_a_request_its_worker_never_confirmed_is_refused_when_the_worker_stays_away() -> None:
    scheduler = with_worker()
    scheduler.submit(make_request("r"), 0.0)
    scheduler.schedule(0.0)
    scheduler.worker_lost("w0", 1.0)
    refused = refusal(scheduler, 3.0)
    assert (refused.code, refused.reason) == ("UNAVAILABLE", "WORKER_LOST")


def test_a_worker_whose_stream_broke_goes_on_where_it_was() -> None:
    """r0 runs there, r1 ended meanwhile, r2 never arrived, r3 was aborted meanwhile."""
    scheduler = with_worker()
    for index in range(4):
        scheduler.submit(make_request(f"r{index}"), 0.0)
    scheduler.schedule(0.0)
    for index in (0, 1, 3):
        scheduler.report("w0", progress(f"r{index}", RequestState.RUNNING, 8), 0.0)
    scheduler.worker_lost("w0", 1.0)
    scheduler.abort(key("r3"))
    in_flight = tuple(Progress(key(name), RequestState.RUNNING, computed_tokens=9) for name in ("r0", "r3"))
    scheduler.register(make_hello(in_flight=in_flight), 1.5)
    assert commands(scheduler, 1.5) == [(1, "abort", key("r3")), (2, "offer", key("r2"))]
    worker = scheduler.fleet.get("w0")
    assert worker is not None
    assert {request.request_id for request in worker.requests} == {"r0", "r2", "r3"}
    assert scheduler.requests.get(key("r1")) is None


def test_a_sequence_in_flight_is_not_offered_again_and_its_pages_count() -> None:
    scheduler = make_scheduler(recovery_seconds=1.0, in_flight_tokens=20)
    scheduler.submit(make_request("old"), 0.0)
    assert answers(scheduler) == []
    running = Progress(key("old"), RequestState.RUNNING, computed_tokens=10)
    unknown = Progress(key("unknown"), RequestState.RUNNING, "a", computed_tokens=100)
    resident = (Residency("a", Tier.PAGES, 7),)
    scheduler.register(make_hello(in_flight=(running, unknown), resident=resident), 0.0)
    assert scheduler.schedule(1.0).answers == {"g": [Placed(key("old"), "w0")]}
    worker = scheduler.fleet.get("w0")
    assert worker is not None
    # "old" grows from 11 to 16 tokens in 5 steps and "unknown" from 101 to 106: 4 + 27 pages, and 7 of the adapter.
    assert worker.room.peak_pages_with(make_request("none", prompt=0, max_tokens=0)) == 38
    scheduler.abort(key("unknown"))
    assert commands(scheduler, 1.0) == [(1, "abort", key("unknown"))]


def test_a_new_scheduler_places_nothing_before_the_workers_had_time_to_come_back() -> None:
    scheduler = with_worker(recovery_seconds=1.0)
    scheduler.submit(make_request("r"), 0.0)
    assert commands(scheduler, 0.9) == []
    # However late it is asked: a timer that fires a moment too early, or a slow loop, must not lose the wakeup.
    assert scheduler.next_wakeup() == 1.0
    assert commands(scheduler, 0.9999) == []
    assert scheduler.next_wakeup() == 1.0
    assert commands(scheduler, 1.0) == [(1, "offer", key("r"))]
    assert scheduler.next_wakeup() is None


def test_a_sequence_that_another_worker_has_or_that_is_outdated_is_aborted_where_it_reappears() -> None:
    scheduler = with_worker()
    scheduler.submit(make_request("here"), 0.0)
    scheduler.submit(make_request("newer", attempt=1), 0.0)
    scheduler.schedule(0.0)
    in_flight = tuple(Progress(key(name), RequestState.RUNNING) for name in ("here", "newer"))
    scheduler.register(make_hello("w1", in_flight=in_flight), 0.0)
    assert commands(scheduler, worker_id="w1") == [(1, "abort", key("here")), (2, "abort", key("newer"))]


@pytest.mark.parametrize(
    ("identity", "reason"),
    [
        (Identity("other", "tokenizer", IDENTITY.geometry), "BASE_MODEL_MISMATCH"),
        (Identity("base", "other", IDENTITY.geometry), "TOKENIZER_MISMATCH"),
        (Identity("base", "tokenizer", {"num_layers": 3, "max_context_tokens": 4096}), "GEOMETRY_MISMATCH"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_worker_must_serve_what_the_others_serve(identity: Identity, reason: str) -> None:
    scheduler = with_worker()
    with pytest.raises(IdentityMismatchError, match=r"worker w1 has .* worker w0 of the fleet has") as raised:
        scheduler.register(make_hello("w1", identity=identity), 0.0)
    assert raised.value.reason == reason
    assert [worker.worker_id for worker in scheduler.fleet.workers] == ["w0"]
    scheduler.register(make_hello("w0", identity=identity), 0.0)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("output_quantile", 0.0), ("output_quantile", 1.1), ("spill_ratio", 0.9), ("max_queued_requests", 0)],
)
def test_settings_out_of_range_are_refused(setting: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{setting} is {value}, expected"):
        make_scheduler(**{setting: value})


def test_pages_are_counted_up() -> None:
    capacity = Capacity(num_pages=10, page_bytes=50, page_size=4, max_sequences=1)
    assert [capacity.adapter_pages(size) for size in (0, 1, 50, 51)] == [0, 1, 1, 2]
    assert [capacity.context_pages(tokens) for tokens in (1, 4, 5)] == [1, 1, 2]
