"""Time as the store sees it: a seam, so that a test of a grace period needs no waiting."""

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """Wall-clock time, because a release time must survive a restart."""

    def now(self) -> float:
        """Seconds since the Unix epoch."""

    async def sleep(self, seconds: float) -> None:
        """Returns when `seconds` have passed."""


class SystemClock:
    def now(self) -> float:
        return time.time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
