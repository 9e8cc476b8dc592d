"""Reports that are late, lost, repeated or nonsense."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.core.fleet import FencedError
from scheduler.core.intake import MAX_REPORTS_AHEAD, MAX_UNKNOWN, NonsenseError, ReportGapError
from scheduler.core.model import Ending, Key, Progress, Report, RequestState, Residency, Tier
from scheduler.core.scheduler import Scheduler
from tests.scheduler.core_fakes import answers, commands, key, make_hello, make_request, with_worker


def numbered(number: int, state: RequestState | Ending, request_id: str = "r") -> Report:
    return Report(number=number, progress=(Progress(key(request_id), state, computed_tokens=1),))


def with_request() -> Scheduler:
    scheduler = with_worker()
    scheduler.submit(make_request("r"), 0.0)
    scheduler.schedule(0.0)
    return scheduler


def test_reports_are_taken_in_order_however_they_come() -> None:
    scheduler = with_request()
    assert not scheduler.report("w0", numbered(3, Ending.FINISHED), 0.0)
    assert not scheduler.report("w0", numbered(2, RequestState.RUNNING), 0.0)
    assert scheduler.requests.get(key("r")) is not None
    assert scheduler.report("w0", numbered(1, RequestState.WAITING), 0.0)
    assert scheduler.requests.get(key("r")) is None


def test_a_report_that_never_comes_asks_for_a_new_hello() -> None:
    scheduler = with_request()
    for number in range(2, MAX_REPORTS_AHEAD + 2):
        scheduler.report("w0", Report(number=number), 0.0)
    with pytest.raises(ReportGapError, match="report 1 of worker w0 is missing"):
        scheduler.report("w0", Report(number=MAX_REPORTS_AHEAD + 2), 0.0)


def test_reports_count_from_one_in_each_registration() -> None:
    scheduler = with_request()
    scheduler.report("w0", Report(number=1), 0.0)
    scheduler.register(make_hello(), 0.0)
    scheduler.report("w0", Report(number=1), 0.0)


NONSENSE: dict[str, tuple[str, Callable[[int], Report]]] = {
    "an epoch to come": ("epoch", lambda epoch: Report(epoch + 1, 1)),
    "an old epoch after this one": ("epoch", lambda epoch: Report(epoch - 1, 1)),
    "a command never given": ("sequence", lambda epoch: Report(epoch, 5)),
    "a command taken back": ("sequence", lambda epoch: Report(epoch, 0, number=2)),
    "a report that came before": ("sequence", lambda epoch: Report(epoch, 1, number=1)),
    "an adapter with negative pages": ("pages", lambda epoch: Report(residency=(Residency("a", Tier.PAGES, -1, 1),))),
    "an adapter larger than the pool": ("pages", lambda epoch: Report(residency=(Residency("a", Tier.PAGES, 65, 1),))),
    "pages that are not all": ("pages", lambda epoch: Report(pages=(60, 0, 0, 3, 0, 0))),
    "negative pages": ("pages", lambda epoch: Report(pages=(-1, 0, 0, 65, 0, 0))),
    "more tokens than a request can have": (
        "tokens",
        lambda epoch: Report(progress=(Progress(key("r"), RequestState.RUNNING, computed_tokens=17),)),
    ),
    "fewer than no tokens": (
        "tokens",
        lambda epoch: Report(progress=(Progress(key("r"), RequestState.RUNNING, computed_tokens=-1),)),
    ),
    "many attempts it was never given": (
        "unknown",
        lambda epoch: Report(
            progress=tuple(Progress(key(f"x{n}"), RequestState.RUNNING) for n in range(MAX_UNKNOWN + 1))
        ),
    ),
}


@pytest.mark.parametrize("case", NONSENSE)
def test_a_worker_that_reports_nonsense_is_kept_out_for_a_while(case: str) -> None:
    reason, report = NONSENSE[case]
    scheduler = with_request()
    worker = scheduler.fleet.workers[0]
    scheduler.report("w0", Report(worker.epoch, 1, number=1, pages=(61, 0, 0, 3, 0, 0)), 0.0)
    with pytest.raises(NonsenseError) as raised:
        scheduler.report("w0", report(worker.epoch), 1.0)
    assert raised.value.reason == reason
    scheduler.fence("w0", 1.0)
    scheduler.worker_lost("w0", 1.0)
    with pytest.raises(FencedError, match=r"worker w0 reported nonsense and may register again in 6\.0 s"):
        scheduler.register(make_hello(), 5.0)
    scheduler.register(make_hello(), 11.0)


def test_a_few_unknown_attempts_are_a_race_and_those_it_was_told_to_end_are_none() -> None:
    scheduler = with_request()
    in_flight = tuple(Progress(key("r"), RequestState.RUNNING) for _ in range(1))
    scheduler.register(make_hello("w1", in_flight=in_flight), 0.0)
    assert commands(scheduler, worker_id="w1") == [(1, "abort", key("r"))]
    for number in range(1, 3 * MAX_UNKNOWN):
        scheduler.report("w1", numbered(number, RequestState.RUNNING), 0.0)
    for number in range(MAX_UNKNOWN):
        scheduler.report("w0", numbered(number + 1, Ending.FINISHED, f"x{number}"), 0.0)


def test_the_requests_of_a_fenced_worker_are_refused_when_it_stays_away() -> None:
    scheduler = with_request()
    answers(scheduler)
    scheduler.fence("w0", 0.0)
    scheduler.worker_lost("w0", 0.0)
    (refused,) = answers(scheduler, 2.0)
    assert refused.key == key("r")


progresses = st.builds(
    Progress,
    key=st.builds(Key, st.sampled_from(["r", "x"]), st.integers(0, 1), st.just("default")),
    state=st.sampled_from([*RequestState, *Ending]),
    adapter=st.sampled_from(["", "a"]),
    computed_tokens=st.integers(-5, 40),
    generated_tokens=st.integers(-5, 40),
)
reports = st.builds(
    Report,
    scheduler_epoch=st.integers(995, 1005),
    applied_seq=st.integers(-1, 4),
    progress=st.lists(progresses, max_size=4).map(tuple),
    residency=st.lists(
        st.builds(Residency, st.sampled_from("ab"), st.sampled_from(Tier), st.integers(-5, 80), st.integers(0, 4)),
        max_size=3,
    ).map(tuple),
    draining=st.none() | st.booleans(),
    pages=st.none() | st.tuples(*[st.integers(-5, 64)] * 6),
    number=st.integers(0, 14),
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(reports, max_size=12))
def test_no_report_breaks_the_scheduler(history: list[Report]) -> None:
    scheduler = with_request()
    for index, report in enumerate(history):
        now = 11.0 * index
        try:
            scheduler.report("w0", report, now)
        except NonsenseError:
            scheduler.fence("w0", now)
            scheduler.worker_lost("w0", now)
            scheduler.register(make_hello(), now + 10.5)
        except ReportGapError:
            scheduler.register(make_hello(), now)
        scheduler.submit(make_request(f"n{index}"), now + 10.5)
        scheduler.schedule(now + 10.5)
        scheduler.next_wakeup()


@pytest.mark.parametrize("arrived", [True, False], ids=["the offer arrived", "the offer did not arrive"])
def test_what_ended_while_the_stream_was_broken_does_not_run_again(arrived: bool) -> None:
    scheduler = with_request()
    epoch = scheduler.fleet.workers[0].epoch
    scheduler.worker_lost("w0", 0.0)
    scheduler.register(make_hello(applied=(epoch, 1 if arrived else 0)), 0.0)
    assert commands(scheduler) == ([] if arrived else [(1, "offer", key("r"))])


def test_what_was_given_back_while_the_stream_was_broken_is_offered_again() -> None:
    scheduler = with_request()
    epoch = scheduler.fleet.workers[0].epoch
    scheduler.worker_lost("w0", 0.0)
    given_back = (Progress(key("r"), Ending.REVOKED),)
    scheduler.register(make_hello(in_flight=given_back, applied=(epoch, 2)), 0.0)
    assert commands(scheduler) == [(1, "offer", key("r"))]


def test_a_draining_worker_gives_back_what_it_has_not_admitted() -> None:
    scheduler = with_request()
    scheduler.register(make_hello("w1"), 0.0)
    scheduler.report("w0", Report(draining=True), 0.0)
    assert commands(scheduler) == [(2, "revoke", key("r"))]
    scheduler.report("w0", numbered(1, Ending.REVOKED), 0.0)
    assert commands(scheduler, worker_id="w1") == [(1, "offer", key("r"))]
