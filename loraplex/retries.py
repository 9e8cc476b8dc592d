"""When a failed call is tried again: only if the service says that it may help, and before anything was delivered."""

import random
from dataclasses import dataclass

from loraplex.errors import LoraplexError, ResourceExhausted, Unavailable

# What a service may ask a client to wait; a longer hint is the caller's to decide about.
MAX_DELAY_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """`attempts` counts the first one; 1 never retries."""

    attempts: int = 3

    def delay_seconds(self, error: LoraplexError, attempt: int) -> float | None:
        """How long to wait after failed attempt number `attempt` (1 is the first); None gives up.

        The service's hint doubles with each attempt, and up to half of it is added at random, so that clients that
        were refused together do not come back together.
        """
        hint = error.retry_after_seconds
        if attempt >= self.attempts or hint is None or not isinstance(error, Unavailable | ResourceExhausted):
            return None
        delay = hint * 2 ** (attempt - 1) * random.uniform(1.0, 1.5)
        return delay if delay <= MAX_DELAY_SECONDS else None


@dataclass
class Attempts:
    """The attempts at one call; raises the error when it has been tried often enough, or time runs out."""

    policy: RetryPolicy
    # When the caller gives up, on the monotonic clock.
    deadline: float | None = None
    made: int = 0

    def wait_seconds(self, error: LoraplexError, now: float) -> float:
        """How long to wait before the next attempt. Raises `error` when there is none."""
        self.made += 1
        delay = self.policy.delay_seconds(error, self.made)
        if delay is None or (self.deadline is not None and now + delay >= self.deadline):
            raise error
        return delay

    def timeout_seconds(self, now: float) -> float | None:
        """What is left for the next attempt."""
        return None if self.deadline is None else max(0.0, self.deadline - now)
