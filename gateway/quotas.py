"""What a tenant may start in a minute, over all gateways when they share a Redis, else at each of them.

Two token buckets for each tenant (requests; tokens of prompts plus `max_tokens`), both or neither: Turner, "New
directions in communications (or which way to the information age?)" (1986). A bucket holds a minute's worth and is
full after a minute without requests, so one that was not touched for so long need not be remembered.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from redis.exceptions import RedisError

from common.errors import FailedPrecondition, ResourceExhausted
from common.redis_client import RedisAddress

_log = logging.getLogger(__name__)

_MINUTE = 60.0
# After a failure Redis is left alone for so long, so that not every caller waits for it.
BREAK_SECONDS = 1.0
# Tenants whose buckets one gateway remembers.
MAX_TENANTS = 10_000

# The rule of `Buckets.take`, inside Redis and by its clock, which all gateways share.
# KEYS  the tenant's buckets: a hash of `at` (seconds), and what is left of each
# ARGV  for each bucket its limit (0: none) and what is asked of it
# Gives the seconds until there is room, 0 when it was taken. A refusal writes nothing.
_TAKE = """
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1000000
local at = tonumber(redis.call('HGET', KEYS[1], 'at') or now)
local wait, left = 0, {}
for i = 1, #ARGV, 2 do
  local limit, cost = tonumber(ARGV[i]), tonumber(ARGV[i + 1])
  if limit > 0 then
    local held = tonumber(redis.call('HGET', KEYS[1], i) or limit)
    local level = math.min(limit, held + math.max(0, now - at) * limit / 60)
    wait = math.max(wait, (cost - level) * 60 / limit)
    left[#left + 1] = i
    left[#left + 1] = level - cost
  end
end
if wait > 0 then return tostring(wait) end
redis.call('HSET', KEYS[1], 'at', string.format('%.6f', now), unpack(left))
redis.call('PEXPIRE', KEYS[1], 60000)
return '0'
"""


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one tenant in a minute; 0 is no limit."""

    requests: int = 0
    tokens: int = 0

    def __bool__(self) -> bool:
        return bool(self.requests or self.tokens)


class Buckets:
    """The buckets of many tenants. No I/O; every `now` is in seconds on the caller's clock."""

    def __init__(self, limits: Limits) -> None:
        self._limits = (limits.requests, limits.tokens)
        # Tenant -> when, and what was left then; least recently used first.
        self._left: OrderedDict[str, tuple[float, tuple[float, ...]]] = OrderedDict()

    def take(self, tenant: str, tokens: int, now: float) -> float:
        """Takes one request and its tokens, or nothing; returns the seconds until there is room, 0 when taken."""
        at, left = self._left.get(tenant, (now, self._limits))
        costs = (1, tokens)
        levels = [
            min(limit, held + max(0.0, now - at) * limit / _MINUTE)
            for held, limit in zip(left, self._limits, strict=True)
        ]
        waits = [
            (cost - level) * _MINUTE / limit
            for cost, level, limit in zip(costs, levels, self._limits, strict=True)
            if limit
        ]
        if (wait := max(waits, default=0.0)) > 0:
            return wait
        self._left[tenant] = now, tuple(level - cost for level, cost in zip(levels, costs, strict=True))
        self._left.move_to_end(tenant)
        if len(self._left) > MAX_TENANTS:
            self._left.popitem(last=False)
        return 0.0


class Quotas:
    """Asks the shared buckets, and this gateway's own while Redis does not answer."""

    def __init__(self, limits: Limits, redis: RedisAddress | None, on_fallback: Callable[[], None]) -> None:
        """`on_fallback` is called for each request that only this gateway has checked though Redis should have.

        Raises OSError when the password's file cannot be read, ValueError when the address is not one.
        """
        self._limits = limits
        self._own = Buckets(limits)
        self._on_fallback = on_fallback
        self._client: Any = redis.client() if redis is not None and limits else None
        self._prefix = "" if redis is None else redis.prefix
        self._take = None if self._client is None else self._client.register_script(_TAKE)
        self._broken_until = float("-inf")

    async def take(self, tenant: str, tokens: int) -> None:
        """`tokens` are those of the prompt plus all that may be generated.

        Raises ResourceExhausted with the time to wait, FailedPrecondition for a request that no minute has room for.
        """
        limits = self._limits
        if not limits:
            return
        if limits.tokens and tokens > limits.tokens:
            message = f"the prompt and max_tokens are {tokens} tokens; a tenant may start {limits.tokens} in a minute"
            raise FailedPrecondition("REQUEST_EXCEEDS_QUOTA", message)
        wait = await self._wait_seconds(tenant, tokens)
        if wait > 0:
            allowed = [f"{limits.requests} requests"] * bool(limits.requests)
            allowed += [f"{limits.tokens} tokens (prompts and max_tokens)"] * bool(limits.tokens)
            message = f"a tenant may start {' and '.join(allowed)} in a minute; there is room in {wait:.1f} s"
            raise ResourceExhausted("QUOTA_EXCEEDED", message, retry_after_seconds=wait)

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    async def _wait_seconds(self, tenant: str, tokens: int) -> float:
        if self._take is None:
            return self._own.take(tenant, tokens, time.monotonic())
        if time.monotonic() >= self._broken_until:
            try:
                arguments = [self._limits.requests, 1, self._limits.tokens, tokens]
                return float(await self._take(keys=[f"{self._prefix}:quota:{tenant}"], args=arguments))
            except (RedisError, OSError) as error:
                self._broken_until = time.monotonic() + BREAK_SECONDS
                _log.warning("quotas are those of this gateway alone: Redis failed: %s", type(error).__name__)
        self._on_fallback()
        return self._own.take(tenant, tokens, time.monotonic())
