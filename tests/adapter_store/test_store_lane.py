"""A lane does everything, in order, and nobody's error is lost."""

import threading
from functools import partial

import pytest

from adapter_store.lane import Lane


def wait_for(event: threading.Event) -> None:
    event.wait()


def fail() -> None:
    raise ZeroDivisionError


def test_jobs_are_done_in_order_and_all_of_them() -> None:
    done: list[int] = []
    with Lane() as lane:
        for number in range(100):
            lane.give(partial(done.append, number))
        lane.finish()
    assert done == list(range(100))


def test_a_giver_waits_for_a_lane_that_is_behind() -> None:
    go, done, done_before = threading.Event(), list[int](), list[int]()

    def let_go() -> None:
        done_before.extend(done)
        go.set()

    with Lane() as lane:
        lane.give(partial(wait_for, go))
        lane.give(partial(done.append, 2))
        threading.Timer(0.05, let_go).start()
        # Without a limit this would return before the timer runs.
        lane.give(partial(done.append, 3))
        assert go.is_set()
        lane.finish()
    assert (done, done_before) == ([2, 3], [])


def test_an_error_comes_out_of_the_lane() -> None:
    with Lane() as lane:
        lane.give(fail)
        with pytest.raises(ZeroDivisionError):
            lane.finish()
