"""Answers on their way to one client: a client that does not read is bounded in memory and in time."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

from common.errors import ResourceExhausted
from gateway.requests import InFlight
from loraplex.v1 import gateway_pb2


@dataclass(frozen=True, slots=True)
class DeliveryLimits:
    """What one client may cost."""

    # How long a message may stay unread.
    write_stall_seconds: float
    max_message_bytes: int


async def deliver(
    answers: AsyncGenerator[gateway_pb2.GenerateResponse, None],
    write: Callable[[gateway_pb2.GenerateResponse], Awaitable[None]],
    in_flight: InFlight,
    limits: DeliveryLimits,
) -> None:
    """Writes each answer; `write` returns when the client's window has room for more.

    Raises SlowReader when a message stays unread for too long, or when more than the request's buffer takes comes in
    meanwhile.
    """
    async with aclosing(answers):
        async for answer in answers:
            check_size(answer, limits.max_message_bytes)
            try:
                async with asyncio.timeout(limits.write_stall_seconds) as stall:
                    in_flight.on_overflow = partial(_expire, stall)
                    await write(answer)
            except TimeoutError:
                raise SlowReader(limits.write_stall_seconds) from None
            finally:
                in_flight.on_overflow = None


class SlowReader(ResourceExhausted):
    """The client does not read."""

    def __init__(self, stall_seconds: float) -> None:
        message = (
            f"the client left a message unread for {stall_seconds:g} s, "
            "or more text came in meanwhile than is kept for one request"
        )
        super().__init__("SLOW_READER", message, metadata={"write_stall_seconds": f"{stall_seconds:g}"})


def check_size(answer: gateway_pb2.GenerateResponse, max_bytes: int) -> None:
    """Raises ResourceExhausted for a message that the transport would not carry."""
    if (size := answer.ByteSize()) > max_bytes:
        message = f"the answer is a message of {size} bytes and may have {max_bytes}: ask for fewer log-probabilities"
        limits = {"message_bytes": str(size), "max_message_bytes": str(max_bytes)}
        raise ResourceExhausted("ANSWER_TOO_LARGE", message, metadata=limits)


def _expire(stall: asyncio.Timeout) -> None:
    if not stall.expired():
        stall.reschedule(asyncio.get_running_loop().time())
