"""Which failures are tried again, how often, and when."""

from collections.abc import Iterator

import pytest
from google.rpc import code_pb2

from loraplex import AsyncClient, Client, LoraplexError, RetryPolicy
from loraplex.errors import NotFound, ResourceExhausted, Unavailable
from loraplex.retries import MAX_DELAY_SECONDS, Attempts
from tests.loraplex import fakes
from tests.loraplex.fakes import FakeGateway

HINT = 0.001
BUSY = fakes.status(code_pb2.RESOURCE_EXHAUSTED, "TOO_MANY_REQUESTS", "busy", retry_after_seconds=HINT)
POLICY = RetryPolicy(attempts=3)


@pytest.fixture
def client(address: str) -> Iterator[Client]:
    with Client(address) as client:
        yield client


@pytest.mark.parametrize(
    ("error", "retried"),
    [
        (Unavailable("A", "a", retry_after_seconds=1.0), True),
        (ResourceExhausted("A", "a", retry_after_seconds=1.0), True),
        (Unavailable("A", "a"), False),
        (ResourceExhausted("A", "a"), False),
        (NotFound("A", "a", retry_after_seconds=1.0), False),
        (Unavailable("A", "a", retry_after_seconds=MAX_DELAY_SECONDS + 1), False),
    ],
    ids=["unavailable", "exhausted", "unavailable for good", "exhausted for good", "not found", "for long"],
)
def test_only_a_short_refusal_is_tried_again(error: LoraplexError, retried: bool) -> None:
    assert (POLICY.delay_seconds(error, 1) is not None) is retried


@pytest.mark.parametrize("attempt", [1, 2])
def test_the_hint_doubles_and_is_never_undercut(attempt: int) -> None:
    error, hint = Unavailable("A", "a", retry_after_seconds=1.0), 2.0 ** (attempt - 1)
    delays = [POLICY.delay_seconds(error, attempt) or 0.0 for _ in range(50)]
    assert hint <= min(delays) < max(delays) <= 1.5 * hint


def test_no_attempt_begins_after_the_deadline() -> None:
    error = Unavailable("A", "a", retry_after_seconds=1.0)
    attempts = Attempts(POLICY, deadline=100.0)
    assert attempts.wait_seconds(error, now=50.0) >= 1.0
    assert attempts.timeout_seconds(now=99.0) == 1.0
    with pytest.raises(Unavailable):
        attempts.wait_seconds(error, now=99.5)


def test_a_refused_call_is_tried_again_under_the_same_id(client: Client, gateway: FakeGateway) -> None:
    gateway.failure, gateway.failing_calls = BUSY, 2
    assert client.generate("one").text == "ONE"
    assert len(gateway.request_ids) == 3
    assert len(set(gateway.request_ids)) == 1


def test_a_refused_stream_is_tried_again(client: Client, gateway: FakeGateway) -> None:
    gateway.failure, gateway.failing_calls = BUSY, 2
    assert [delta.text for delta in client.stream("one two")] == ["one", "two"]


def test_a_call_is_given_up_after_its_attempts(client: Client, gateway: FakeGateway) -> None:
    gateway.failure = BUSY
    with pytest.raises(ResourceExhausted):
        client.generate("one")
    assert len(gateway.requests) == POLICY.attempts


def test_a_client_may_never_try_again(address: str, gateway: FakeGateway) -> None:
    gateway.failure = BUSY
    with Client(address, retries=RetryPolicy(attempts=1)) as client, pytest.raises(ResourceExhausted):
        client.generate("one")
    assert len(gateway.requests) == 1


def test_a_stream_that_has_begun_is_never_tried_again(client: Client, gateway: FakeGateway) -> None:
    gateway.failure, gateway.words_before_failure = BUSY, 1
    stream = client.stream("one two")
    assert next(stream).text == "one"
    with pytest.raises(ResourceExhausted):
        next(stream)
    assert len(gateway.requests) == 1


async def test_the_async_client_tries_again_too(address: str, gateway: FakeGateway) -> None:
    gateway.failure, gateway.failing_calls = BUSY, 1
    async with AsyncClient(address) as client:
        assert (await client.generate("one")).text == "ONE"
        gateway.failing_calls = 3
        assert [delta.text async for delta in client.stream("one two")] == ["one", "two"]


async def test_a_stream_of_the_async_client_that_has_begun_is_never_tried_again(
    address: str, gateway: FakeGateway
) -> None:
    gateway.failure, gateway.words_before_failure = BUSY, 1
    async with AsyncClient(address) as client:
        stream = client.stream("one two")
        assert (await anext(stream)).text == "one"
        with pytest.raises(ResourceExhausted):
            await anext(stream)
    assert len(gateway.requests) == 1
