"""The table of requests in flight: offsets, attempts, and what a waiter finds."""

import asyncio

import pytest

from common.errors import AlreadyExists, Internal, InvalidArgument, Unavailable, to_proto
from gateway.requests import InFlight, RequestTable
from loraplex.v1 import types_pb2
from tests.gateway.fakes import tokens

KEY = types_pb2.RequestKey(request_id="r", attempt=1)


def in_flight(request_id: str = "r", n: int = 1) -> InFlight:
    key = types_pb2.RequestKey(request_id=request_id, attempt=1)
    return InFlight(types_pb2.RequestSpec(key=key, output=types_pb2.OutputParams(n=n), prompt_token_ids=[1, 2]))


class Counted:
    """A table and what it counted."""

    def __init__(self, request: InFlight) -> None:
        self.duplicates = 0
        self.gaps = 0
        self.table = RequestTable(self._duplicates, self._gaps)
        self.table.add(request)

    def _duplicates(self, number: int) -> None:
        self.duplicates += number

    def _gaps(self, number: int) -> None:
        self.gaps += number


def buffered(limit: int) -> InFlight:
    return InFlight(types_pb2.RequestSpec(key=KEY), max_buffered_bytes=limit)


def taken(request: InFlight) -> list[int]:
    return [token for output in request.take().outputs for token in output.token_ids]


def test_a_take_has_everything_since_the_last() -> None:
    request = in_flight()
    counted = Counted(request)
    counted.table.apply("w", tokens(KEY, 0, [1]))
    counted.table.apply("w", tokens(KEY, 1, [2, 3]))
    assert taken(request) == [1, 2, 3]
    counted.table.apply("w", tokens(KEY, 3, [4]))
    delta = request.take()
    assert (delta.outputs[0].token_offset, delta.outputs[0].token_ids) == (3, [4])
    assert request.take().outputs == []


def test_the_last_take_has_finish_and_usage() -> None:
    request = in_flight()
    usage = types_pb2.Usage(prompt_tokens=2, completion_tokens=1)
    Counted(request).table.apply("w", tokens(KEY, 0, [1], finish=True, usage=usage, matched_stop_token_id=1))
    delta = request.take()
    assert delta.usage == usage
    assert delta.outputs[0].finish_reason == types_pb2.FINISH_REASON_LENGTH
    assert delta.outputs[0].matched_stop_token_id == 1
    assert request.ended_remotely


@pytest.mark.parametrize(
    ("offset", "ids", "duplicates", "result"),
    [
        pytest.param(0, [1, 2], 2, [1, 2], id="all known"),
        pytest.param(1, [2, 3], 1, [1, 2, 3], id="half known"),
        pytest.param(2, [3], 0, [1, 2, 3], id="all new"),
        pytest.param(0, [1], 1, [1, 2], id="older"),
    ],
)
def test_known_tokens_are_dropped(offset: int, ids: list[int], duplicates: int, result: list[int]) -> None:
    request = in_flight()
    counted = Counted(request)
    counted.table.apply("w", tokens(KEY, 0, [1, 2]))
    counted.table.apply("w", tokens(KEY, offset, ids))
    assert counted.duplicates == duplicates
    assert taken(request) == result


def test_known_tokens_are_dropped_after_a_take() -> None:
    request = in_flight()
    table = Counted(request).table
    table.apply("w", tokens(KEY, 0, [1, 2]))
    request.take()
    table.apply("w", tokens(KEY, 0, [1, 2, 3]))
    assert taken(request) == [3]


def test_a_gap_fails_the_request() -> None:
    request = in_flight()
    counted = Counted(request)
    counted.table.apply("w", tokens(KEY, 1, [2]))
    assert counted.gaps == 1
    with pytest.raises(Internal) as caught:
        request.take()
    assert caught.value.reason == "TOKEN_GAP"
    assert not request.ended_remotely


def test_an_output_that_was_not_asked_for_fails_the_request() -> None:
    request = in_flight()
    Counted(request).table.apply("w", tokens(KEY, 0, [2], output_index=1))
    with pytest.raises(Internal):
        request.take()


@pytest.mark.parametrize("attempt", [0, 2])
def test_tokens_of_another_attempt_are_dropped(attempt: int) -> None:
    request = in_flight()
    other = types_pb2.RequestKey(request_id="r", attempt=attempt)
    counted = Counted(request)
    counted.table.apply("w", tokens(other, 0, [9], finish=True))
    counted.table.refuse(other, Unavailable("X", "x"))
    counted.table.place(other, "w9")
    assert not request.complete
    assert request.worker_id == ""


def test_tokens_of_nobody_are_dropped() -> None:
    Counted(in_flight()).table.apply("w", tokens(types_pb2.RequestKey(request_id="gone"), 0, [9]))


def test_nothing_comes_after_the_end() -> None:
    request = in_flight()
    counted = Counted(request)
    counted.table.apply("w", tokens(KEY, 0, [1], finish=True))
    counted.table.apply("w", tokens(KEY, 1, [2]))
    counted.table.fail_placed("w", lambda: Unavailable("X", "x"))
    assert taken(request) == [1]


def test_an_id_is_in_flight_once() -> None:
    request = in_flight()
    table = Counted(request).table
    with pytest.raises(AlreadyExists, match="'r'"):
        table.add(in_flight())
    assert table.remove(request)
    table.add(in_flight())
    assert not table.remove(request)


def test_an_error_of_the_worker_is_the_requests() -> None:
    request = in_flight()
    error = to_proto(InvalidArgument("BAD", "a sentence"))
    Counted(request).table.apply("w", tokens(KEY, 0, [], finish_reason=types_pb2.FINISH_REASON_ERROR, error=error))
    assert request.ended_remotely
    with pytest.raises(InvalidArgument, match="a sentence"):
        request.take()


def test_a_worker_that_fails_without_a_word_is_internal() -> None:
    request = in_flight()
    Counted(request).table.apply("w", tokens(KEY, 0, [], finish_reason=types_pb2.FINISH_REASON_ERROR))
    with pytest.raises(Internal, match="quote request id r"):
        request.take()


def test_a_refusal_is_the_requests_error() -> None:
    request = in_flight()
    Counted(request).table.refuse(KEY, Unavailable("FULL", "full"))
    assert request.ended_remotely
    with pytest.raises(Unavailable, match="full"):
        request.take()


def test_a_lost_worker_fails_its_requests_only() -> None:
    mine, other, unplaced = in_flight("r"), in_flight("s"), in_flight("t")
    table = Counted(mine).table
    table.add(other)
    table.add(unplaced)
    table.place(mine.key, "w0")
    table.place(other.key, "w1")
    table.fail_placed("w0", lambda: Unavailable("WORKER_LOST", "lost"))
    assert [request.complete for request in (mine, other, unplaced)] == [True, False, False]
    assert list(table.unplaced()) == [unplaced]


def test_tokens_tell_where_a_request_is_before_the_scheduler_does() -> None:
    request = in_flight()
    table = Counted(request).table
    table.apply("w3", tokens(KEY, 0, [1]))
    assert request.worker_id == "w3"
    assert list(table.unplaced()) == []


def test_outputs_are_kept_apart() -> None:
    request = in_flight(n=2)
    table = Counted(request).table
    table.apply("w", tokens(KEY, 0, [5], finish=True, output_index=1))
    assert not request.complete
    first = request.take()
    assert [(output.index, output.token_ids, output.finished) for output in first.outputs] == [(1, [5], True)]
    table.apply("w", tokens(KEY, 0, [6], finish=True, output_index=0))
    last = request.take()
    assert [(output.index, output.token_ids) for output in last.outputs] == [(0, [6])]


async def test_a_waiter_wakes_for_news_and_finds_all_of_it() -> None:
    request = in_flight()
    table = Counted(request).table
    waiter = asyncio.create_task(request.wait())
    table.apply("w", tokens(KEY, 0, [1]))
    table.apply("w", tokens(KEY, 1, [2]))
    await waiter
    assert taken(request) == [1, 2]
    again = asyncio.create_task(request.wait())
    table.fail_placed("w", lambda: Unavailable("X", "x"))
    await again


def test_an_output_that_ended_here_takes_no_more_tokens() -> None:
    request = in_flight(n=2)
    counted = Counted(request)
    counted.table.apply("w", tokens(KEY, 0, [1, 2]))
    request.take()
    assert request.end([0]) == [0]
    counted.table.apply("w", tokens(KEY, 4, [5], finish_reason=types_pb2.FINISH_REASON_ABORTED))
    assert request.take().outputs == []
    assert (counted.duplicates, counted.gaps, request.complete) == (0, 0, False)


def test_an_output_that_the_worker_has_ended_is_not_ended_again() -> None:
    request = in_flight()
    Counted(request).table.apply("w", tokens(KEY, 0, [1], finish=True))
    assert request.end([0]) == []


def test_log_probabilities_of_the_prompt_are_taken_once() -> None:
    request = in_flight()
    table = Counted(request).table
    positions = [types_pb2.PositionLogprobs(), types_pb2.PositionLogprobs(chosen=types_pb2.TokenLogprob(token_id=7))]
    for _ in range(2):
        table.apply("w", tokens(KEY, 0, [1], prompt_logprobs=positions))
    assert request.take().prompt_logprobs == positions
    table.apply("w", tokens(KEY, 0, [1], prompt_logprobs=positions))
    assert request.take().prompt_logprobs == []


def test_more_than_the_buffer_takes_is_an_overflow() -> None:
    request, overflows = buffered(100), []
    request.on_overflow = lambda: overflows.append(True)
    table = Counted(request).table
    table.apply("w", tokens(KEY, 0, [1] * 60))
    assert not overflows
    table.apply("w", tokens(KEY, 60, [1] * 60))
    assert overflows


def test_what_was_taken_is_no_longer_buffered() -> None:
    request, overflows = buffered(100), []
    request.on_overflow = lambda: overflows.append(True)
    table = Counted(request).table
    for offset in range(0, 600, 60):
        table.apply("w", tokens(KEY, offset, [1] * 60))
        request.take()
    assert not overflows
