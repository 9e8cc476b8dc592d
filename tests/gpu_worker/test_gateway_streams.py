"""Whose tokens go where, for how long a gateway may be away, and what it hears when the engine dies."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from common.errors import Unavailable
from gpu_worker.gateway_streams import GATEWAY_GRACE_SECONDS, GatewayStreams
from loraplex.v1 import engine_pb2, types_pb2, worker_pb2
from tests.gpu_worker.engine_driver import key

Queue = asyncio.Queue[worker_pb2.TokenBatch]


class Timers:
    """Stands for the loop's clock: `pass_time` fires what is due then."""

    def __init__(self, loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch) -> None:
        self._due: list[tuple[float, asyncio.TimerHandle, Callable[[], None]]] = []
        self._loop = loop
        self._now = 0.0
        monkeypatch.setattr(loop, "call_later", self._call_later)

    def _call_later(self, delay: float, callback: Callable[..., None], *args: Any) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(self._loop.time() + delay, callback, args, self._loop)
        self._due.append((self._now + delay, handle, lambda: callback(*args)))
        return handle

    def pass_time(self, seconds: float) -> None:
        self._now += seconds
        due = [entry for entry in self._due if entry[0] <= self._now]
        self._due = [entry for entry in self._due if entry[0] > self._now]
        for _, handle, call in due:
            if not handle.cancelled():
                call()


@pytest.fixture
async def timers(monkeypatch: pytest.MonkeyPatch) -> Timers:
    return Timers(asyncio.get_running_loop(), monkeypatch)


@pytest.fixture
def lost() -> list[str]:
    """Gateways that were declared dead."""
    return []


@pytest.fixture
async def streams(timers: Timers, lost: list[str]) -> GatewayStreams:
    return GatewayStreams("worker", lost.append)


def tokens(gateway_id: str, name: str, *, finish: bool = False) -> engine_pb2.GatewayTokens:
    reason = types_pb2.FINISH_REASON_STOP if finish else types_pb2.FINISH_REASON_UNSPECIFIED
    message = worker_pb2.SequenceTokens(key=key(name), token_ids=[5], finish_reason=reason)
    return engine_pb2.GatewayTokens(gateway_id=gateway_id, sequences=[message])


def received(queue: Queue) -> list[str]:
    """Requests of the messages that wait in a queue."""
    names = []
    while not queue.empty():
        names += [message.key.request_id for message in queue.get_nowait().sequences]
    return names


async def test_a_gateway_gets_its_tokens_only(streams: GatewayStreams) -> None:
    ours, theirs = streams.attach("ours"), streams.attach("theirs")
    streams.deliver(3, [tokens("ours", "s"), tokens("theirs", "t")])
    assert (received(ours), received(theirs)) == (["s"], ["t"])


async def test_a_message_says_which_worker_and_step(streams: GatewayStreams) -> None:
    queue = streams.attach("g")
    streams.deliver(3, [tokens("g", "s")])
    batch = queue.get_nowait()
    assert (batch.worker_id, batch.step_number) == ("worker", 3)


async def test_tokens_wait_for_a_gateway_that_is_not_here_yet(streams: GatewayStreams) -> None:
    streams.own("g", key("s"))
    streams.deliver(1, [tokens("g", "s")])
    assert received(streams.attach("g")) == ["s"]


async def test_a_gateway_that_comes_back_in_time_keeps_its_sequences(
    streams: GatewayStreams, timers: Timers, lost: list[str]
) -> None:
    streams.detach("g", streams.attach("g"))
    timers.pass_time(0.9 * GATEWAY_GRACE_SECONDS)
    streams.attach("g")
    timers.pass_time(10 * GATEWAY_GRACE_SECONDS)
    assert lost == []


async def test_a_gateway_that_stays_away_is_lost(streams: GatewayStreams, timers: Timers, lost: list[str]) -> None:
    streams.detach("g", streams.attach("g"))
    timers.pass_time(GATEWAY_GRACE_SECONDS)
    assert lost == ["g"]


async def test_a_gateway_that_never_comes_is_lost(streams: GatewayStreams, timers: Timers, lost: list[str]) -> None:
    streams.own("g", key("s"))
    timers.pass_time(GATEWAY_GRACE_SECONDS)
    assert lost == ["g"]


async def test_an_attached_gateway_is_never_lost(streams: GatewayStreams, timers: Timers, lost: list[str]) -> None:
    streams.attach("g")
    streams.own("g", key("s"))
    timers.pass_time(10 * GATEWAY_GRACE_SECONDS)
    assert lost == []


async def test_tokens_of_a_lost_gateway_are_dropped(streams: GatewayStreams, timers: Timers) -> None:
    streams.own("g", key("s"))
    timers.pass_time(GATEWAY_GRACE_SECONDS)
    streams.deliver(1, [tokens("g", "s")])
    (message,) = streams.attach("g").get_nowait().sequences
    assert not message.token_ids


class TestSecondStreamOfAGateway:
    """A gateway dials again before this worker has noticed that the old stream is dead."""

    async def test_it_gets_what_comes(self, streams: GatewayStreams) -> None:
        old, new = streams.attach("g"), streams.attach("g")
        streams.deliver(1, [tokens("g", "s")])
        assert (received(old), received(new)) == ([], ["s"])

    async def test_it_gets_what_waited(self, streams: GatewayStreams) -> None:
        streams.attach("g")
        streams.deliver(1, [tokens("g", "s")])
        assert received(streams.attach("g")) == ["s"]

    async def test_the_end_of_the_old_one_does_not_lose_the_gateway(
        self, streams: GatewayStreams, timers: Timers, lost: list[str]
    ) -> None:
        old = streams.attach("g")
        streams.attach("g")
        streams.detach("g", old)
        timers.pass_time(10 * GATEWAY_GRACE_SECONDS)
        assert lost == []


class TestIdle:
    async def test_nothing_in_flight_is_idle(self, streams: GatewayStreams) -> None:
        assert streams.idle.is_set()

    async def test_an_offered_sequence_is_in_flight(self, streams: GatewayStreams) -> None:
        streams.own("g", key("s"))
        assert not streams.idle.is_set()

    async def test_tokens_do_not_end_a_sequence(self, streams: GatewayStreams) -> None:
        streams.own("g", key("s"))
        streams.deliver(1, [tokens("g", "s")])
        assert not streams.idle.is_set()

    async def test_a_finished_sequence_is_over(self, streams: GatewayStreams) -> None:
        streams.own("g", key("s"))
        streams.deliver(1, [tokens("g", "s", finish=True)])
        assert streams.idle.is_set()

    async def test_a_revoked_sequence_is_over(self, streams: GatewayStreams) -> None:
        streams.own("g", key("s"))
        streams.release([key("s")])
        assert streams.idle.is_set()

    async def test_sequences_of_a_lost_gateway_are_over(self, streams: GatewayStreams, timers: Timers) -> None:
        streams.own("g", key("s"))
        timers.pass_time(GATEWAY_GRACE_SECONDS)
        assert streams.idle.is_set()

    async def test_one_of_two_is_not_all(self, streams: GatewayStreams) -> None:
        streams.own("g", key("s"))
        streams.own("h", key("t"))
        streams.deliver(1, [tokens("g", "s", finish=True)])
        assert not streams.idle.is_set()


class TestEngineLost:
    LOST = Unavailable("ENGINE_LOST", "gone", retry_after_seconds=1.0)

    async def test_what_is_in_flight_fails(self, streams: GatewayStreams) -> None:
        queue = streams.attach("g")
        streams.own("g", key("s"))
        streams.fail_all(self.LOST)
        (message,) = queue.get_nowait().sequences
        assert (message.finish_reason, message.error.reason, message.error.retry_after_seconds) == (
            types_pb2.FINISH_REASON_ERROR,
            "ENGINE_LOST",
            1.0,
        )

    async def test_what_has_finished_does_not_fail(self, streams: GatewayStreams) -> None:
        queue = streams.attach("g")
        streams.own("g", key("s"))
        streams.deliver(1, [tokens("g", "s", finish=True)])
        streams.fail_all(self.LOST)
        assert received(queue) == ["s"]

    async def test_nothing_is_in_flight_afterwards(self, streams: GatewayStreams) -> None:
        streams.own("g", key("s"))
        streams.fail_all(self.LOST)
        assert streams.idle.is_set()


async def test_a_gateway_that_comes_too_late_hears_what_was_freed(streams: GatewayStreams, timers: Timers) -> None:
    streams.own("late", key("s"))
    timers.pass_time(GATEWAY_GRACE_SECONDS)
    (message,) = streams.attach("late").get_nowait().sequences
    assert (message.key, message.error.reason) == (key("s"), "WORKER_LOST")
    assert streams.attach("late").empty()


async def test_a_request_is_in_flight_until_its_last_output_has_ended(streams: GatewayStreams) -> None:
    streams.attach("a")
    streams.own("a", key("s"), outputs=2)
    streams.deliver(1, [tokens("a", "s", finish=True)])
    assert not streams.idle.is_set()
    streams.deliver(2, [tokens("a", "s", finish=True)])
    assert streams.idle.is_set()
