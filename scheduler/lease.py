"""Which of several schedulers is the active one: a lease in Redis, and the epoch that fences those before.

A key with a random token and a time to live, taken with SET NX PX and kept or given back only by who holds the token:
"Distributed Locks with Redis", redis.io. A lease alone cannot stop a holder that slept through its end; so each taking
of it draws an epoch greater than all before, and workers and gateways refuse older ones: Kleppmann, "How to do
distributed locking" (2016).
"""

import asyncio
import logging
import secrets
import time
from typing import Any

from redis.exceptions import RedisError

_log = logging.getLogger(__name__)

# Epochs of one scheduler's life: each registration of a worker has one of its own.
EPOCHS_PER_LIFE = 1 << 20
# A holder renews, and a standby tries, so many times in the life of a lease.
_TRIES_PER_LEASE = 5

# Takes the lease when nobody has it, and draws an epoch.
# KEYS  lease, epoch
# ARGV  token, milliseconds to live, Unix milliseconds of the caller, epochs of one life
# Gives the epoch, or nothing while somebody else has the lease. The epoch grows by what a life may use even when a
# clock was set back, and is that of the clock when Redis has lost its keys, or a scheduler without Redis ran before.
_ACQUIRE = """
if not redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then return false end
local last = tonumber(redis.call('GET', KEYS[2]) or '0')
local epoch = string.format('%d', math.max(tonumber(ARGV[3]), last + tonumber(ARGV[4])))
redis.call('SET', KEYS[2], epoch)
return epoch
"""

# KEYS  lease
# ARGV  token, milliseconds to live
# Gives 1, or 0 when the lease has ended or is another's.
_RENEW = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""

# KEYS  lease
# ARGV  token
_RELEASE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
"""


class Lease:
    """Held by one scheduler at a time. One event loop."""

    def __init__(self, client: Any, prefix: str, seconds: float) -> None:
        """`client` is a redis.asyncio client that fails fast; a lease ends `seconds` after it was last renewed."""
        self._client = client
        self._seconds = seconds
        self._key = f"{prefix}:scheduler:lease"
        self._epoch_key = f"{prefix}:scheduler:epoch"
        self._acquire, self._renew, self._release = (
            client.register_script(text) for text in (_ACQUIRE, _RENEW, _RELEASE)
        )
        self._token = secrets.token_hex(16)
        # When Redis was asked last that renewed the lease or did not answer; a renewal counts from a moment after it.
        self._sure_at = float("-inf")
        self._silent = False

    @property
    def current(self) -> bool:
        """Whether the holder may act now.

        After a sleep longer than the lease it may not, until Redis has been asked whose the lease is. While Redis does
        not answer whoever has the lease goes on: the fleet outlives its Redis.
        """
        return time.monotonic() < self._sure_at + self._seconds

    async def acquire(self) -> int:
        """Waits until the lease is ours; returns the epoch."""
        milliseconds = round(self._seconds * 1000)
        while True:
            asked_at = time.monotonic()
            arguments = [self._token, milliseconds, time.time_ns() // 1_000_000, EPOCHS_PER_LIFE]
            epoch = await self._ask(self._acquire, [self._key, self._epoch_key], arguments)
            if epoch:
                self._sure_at = asked_at
                return int(epoch)
            await asyncio.sleep(self._seconds / _TRIES_PER_LEASE)

    async def keep(self) -> None:
        """Renews the lease; returns once it is not ours any more."""
        arguments = [self._token, round(self._seconds * 1000)]
        while True:
            await asyncio.sleep(self._seconds / _TRIES_PER_LEASE)
            asked_at = time.monotonic()
            if await self._ask(self._renew, [self._key], arguments) == 0:
                self._sure_at = float("-inf")
                return
            self._sure_at = asked_at

    async def close(self) -> None:
        """Gives the lease back if it is ours, so that a standby need not wait for its end."""
        try:
            await self._release(keys=[self._key], args=[self._token])
        except (RedisError, OSError) as error:
            _log.info("the lease is left to end by itself: %s", error)
        await self._client.aclose()

    async def _ask(self, script: Any, keys: list[str], arguments: list[Any]) -> Any:
        """What the script gives; None when Redis does not answer, too."""
        try:
            answer = await script(keys=keys, args=arguments)
        except (RedisError, OSError) as error:
            if not self._silent:
                _log.warning("Redis does not answer for the scheduler's lease: %s", error)
            self._silent = True
            return None
        self._silent = False
        return answer
