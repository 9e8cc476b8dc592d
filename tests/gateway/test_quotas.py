"""What a tenant may start in a minute, at one gateway and over several that share a Redis."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import FailedPrecondition, ResourceExhausted
from common.redis_client import RedisAddress
from gateway.config import GatewayConfig
from gateway.quotas import BREAK_SECONDS, Buckets, Limits, Quotas
from tests.adapter_store.redis_server import PATIENT_SECONDS, RedisServer
from tests.gateway.conftest import StartFleet, ask, failure, reason_of, retry_seconds_of
from tests.gateway.fakes import token_ids, tokens


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path / "redis")
    server.start()
    yield server
    server.stop()


class Shared:
    """Quotas of one gateway; `alone` counts what it has checked without Redis."""

    def __init__(self, server: RedisServer, limits: Limits) -> None:
        self.alone = 0
        self.quotas = Quotas(limits, RedisAddress(server.url, timeout_seconds=PATIENT_SECONDS), self.count)

    def count(self) -> None:
        self.alone += 1

    async def started(self, calls: int, tokens: int = 1, tenant: str = "t") -> int:
        """How many of so many calls are let through."""
        passed = 0
        for _ in range(calls):
            try:
                await self.quotas.take(tenant, tokens)
            except ResourceExhausted:
                continue
            passed += 1
        return passed


class TestBuckets:
    def test_a_minute_has_room_for_the_limit_and_says_when_there_is_more(self) -> None:
        buckets = Buckets(Limits(requests=6))
        assert [buckets.take("t", 1, 100.0) for _ in range(7)] == [0.0] * 6 + [10.0]
        assert buckets.take("t", 1, 109.9) == pytest.approx(0.1)
        assert buckets.take("t", 1, 110.1) == 0.0

    def test_both_or_neither(self) -> None:
        buckets = Buckets(Limits(requests=2, tokens=100))
        assert buckets.take("t", 80, 0.0) == 0.0
        # Refused for its tokens, so the request is still there.
        assert buckets.take("t", 30, 0.0) == pytest.approx(6.0)
        assert buckets.take("t", 20, 0.0) == 0.0
        assert buckets.take("t", 0, 0.0) == pytest.approx(30.0)

    def test_tenants_have_their_own(self) -> None:
        buckets = Buckets(Limits(requests=1))
        assert [buckets.take(tenant, 1, 0.0) for tenant in "aabb"] == [0.0, 60.0, 0.0, 60.0]

    @given(st.lists(st.tuples(st.floats(0, 30), st.integers(1, 60)), max_size=60))
    def test_no_minute_starts_more_than_twice_the_limit(self, calls: list[tuple[float, int]]) -> None:
        """A full bucket and what refills it while it is emptied."""
        buckets, now, taken = Buckets(Limits(tokens=60)), 0.0, []
        for pause, cost in calls:
            now += pause
            if buckets.take("t", cost, now) == 0.0:
                taken.append((now, cost))
        for start, _ in taken:
            assert sum(cost for at, cost in taken if start <= at < start + 60.0) <= 120 + 1e-6


class TestShared:
    async def test_the_sum_over_gateways_is_bounded(self, redis_server: RedisServer) -> None:
        gateways = [Shared(redis_server, Limits(requests=30)) for _ in range(2)]
        # Each has its connection before they race.
        started_at = time.monotonic()
        first = [await gateway.started(1) for gateway in gateways]
        passed = await asyncio.gather(*(gateway.started(40) for gateway in gateways))
        # A bucket of 30 fills up again by one in two seconds.
        refilled = (time.monotonic() - started_at) / 2
        assert first == [1, 1]
        assert 28 <= sum(passed) <= 29 + refilled
        assert [gateway.alone for gateway in gateways] == [0, 0]
        for gateway in gateways:
            await gateway.quotas.close()

    async def test_gateways_without_redis_each_have_the_whole(self) -> None:
        """The control of the one above."""
        passed = 0
        for _ in range(2):
            quotas = Quotas(Limits(requests=30), None, lambda: None)
            for _ in range(30):
                await quotas.take("t", 1)
                passed += 1
        assert passed == 60

    async def test_redis_decides_as_one_gateway_would(self, redis_server: RedisServer) -> None:
        shared = Shared(redis_server, Limits(requests=1000, tokens=100))
        await shared.quotas.take("t", 80)
        with pytest.raises(ResourceExhausted, match="1000 requests and 100 tokens") as caught:
            await shared.quotas.take("t", 50)
        # 30 tokens are missing, 100 come in a minute.
        assert caught.value.retry_after_seconds is not None
        assert 0 < caught.value.retry_after_seconds <= 18.0
        await shared.quotas.take("other", 50)
        await shared.quotas.close()

    async def test_keys_of_idle_tenants_go_by_themselves(self, redis_server: RedisServer) -> None:
        shared = Shared(redis_server, Limits(requests=5))
        await shared.quotas.take("t", 1)
        left = redis_server.call("PTTL", "loraplex:quota:t")
        assert isinstance(left, int)
        assert 0 < left <= 60_000
        await shared.quotas.close()

    async def test_while_redis_is_away_each_gateway_limits_alone(self, redis_server: RedisServer) -> None:
        shared = Shared(redis_server, Limits(requests=10))
        await shared.quotas.take("t", 1)
        redis_server.stop()
        passed = await shared.started(12)
        assert (10 <= passed <= 11, shared.alone) == (True, 12)
        await shared.quotas.close()

    async def test_a_frozen_redis_is_left_alone_for_a_while_and_then_asked_again(
        self, redis_server: RedisServer, caplog: pytest.LogCaptureFixture
    ) -> None:
        shared = Shared(redis_server, Limits(requests=1000))
        shared.quotas = Quotas(Limits(requests=1000), RedisAddress(redis_server.url), shared.count)
        redis_server.pause()
        assert await shared.started(20) == 20
        # Each caller that waits for Redis leaves a line; the others come within the break.
        assert (len(caplog.messages) < 10, shared.alone) == (True, 20)
        redis_server.resume()
        async with asyncio.timeout(100 * BREAK_SECONDS):
            alone = 0
            while shared.alone > alone:
                await asyncio.sleep(BREAK_SECONDS / 10)
                alone = shared.alone
                await shared.quotas.take("t", 1)
        await shared.quotas.close()


async def test_a_request_larger_than_a_minute_is_refused_for_good() -> None:
    quotas = Quotas(Limits(tokens=100), None, lambda: None)
    with pytest.raises(FailedPrecondition, match="are 101 tokens; a tenant may start 100 in a minute"):
        await quotas.take("t", 101)


def test_a_negative_quota_is_refused() -> None:
    with pytest.raises(ValueError, match="tenant_tokens_per_minute is -1; it must not be negative"):
        GatewayConfig(scheduler="s:1", adapter_store="a:1", tenant_tokens_per_minute=-1)


async def test_two_gateways_refuse_the_tenant_together(start_fleet: StartFleet, redis_server: RedisServer) -> None:
    options = {"redis": redis_server.url, "redis_timeout_seconds": PATIENT_SECONDS, "tenant_requests_per_minute": 1}
    first, second = await start_fleet(**options), await start_fleet(**options)
    call = first.api.Generate(ask())
    key = await first.running()
    error = await failure(second.api.Generate(ask()))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED")
    assert 0 < (retry_seconds_of(error) or 0) <= 60
    await first.worker.say(tokens(key, 0, token_ids("a"), finish=True))
    await call
