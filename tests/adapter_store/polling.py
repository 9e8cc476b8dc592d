"""Waiting for what a store does by itself."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from common.errors import LoraplexError

_Result = TypeVar("_Result")

_STEP_SECONDS = 0.02


async def eventually(call: Callable[[], Awaitable[_Result]], *, within_seconds: float = 60.0) -> _Result:
    """The first result of `call` that is neither an error of the store nor false."""
    deadline = time.monotonic() + within_seconds
    while True:
        try:
            if result := await call():
                return result
        except LoraplexError:
            if time.monotonic() > deadline:
                raise
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(_STEP_SECONDS)
