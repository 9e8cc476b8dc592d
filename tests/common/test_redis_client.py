"""Clients of Redis, as every service makes them."""

import socket

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from common.redis_client import RedisAddress


async def test_a_command_that_fails_is_timed_too() -> None:
    seconds: list[float] = []
    with socket.socket() as bound:
        # Bound and not listening: every connection is refused.
        bound.bind(("127.0.0.1", 0))
        client = RedisAddress(f"redis://127.0.0.1:{bound.getsockname()[1]}").client(observe=seconds.append)
        with pytest.raises(RedisConnectionError):
            await client.ping()
        await client.aclose()
    assert len(seconds) == 1
    assert seconds[0] > 0
