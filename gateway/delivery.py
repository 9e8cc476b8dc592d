"""Answers on their way to one client: a client that does not read is bounded in memory and in time."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

import grpc

from common.errors import ResourceExhausted
from gateway.requests import InFlight
from loraplex.v1 import gateway_pb2, types_pb2

# How long grpc may take to cancel a call after it has failed its last message.
CANCEL_SECONDS = 1.0
# An id, a float and a character, with what protobuf puts around them.
MIN_LOGPROB_BYTES = 12


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
    on_slow_reader: Callable[[], None],
) -> None:
    """Writes each answer; `write` returns when the client's window has room for more.

    Raises ResourceExhausted SLOW_READER, after a call of `on_slow_reader`, when a message stays unread for too long or
    more than the request's buffer takes comes in meanwhile.
    """
    async with aclosing(answers):
        async for answer in answers:
            check_size(answer, limits.max_message_bytes)
            try:
                async with asyncio.timeout(limits.write_stall_seconds) as stall:
                    in_flight.on_overflow = partial(_expire, stall)
                    await write(answer)
            except TimeoutError:
                on_slow_reader()
                raise _slow_reader(limits.write_stall_seconds) from None
            except grpc.aio.InternalError:
                # The client left with a message on its way; grpc cancels this task in a moment.
                await asyncio.sleep(CANCEL_SECONDS)
                raise
            finally:
                in_flight.on_overflow = None


def _slow_reader(stall_seconds: float) -> ResourceExhausted:
    message = (
        f"the client left a message unread for {stall_seconds:g} s, "
        "or more text came in meanwhile than is kept for one request"
    )
    return ResourceExhausted("SLOW_READER", message, metadata={"write_stall_seconds": f"{stall_seconds:g}"})


def check_size(answer: gateway_pb2.GenerateResponse, max_bytes: int) -> None:
    """Raises ResourceExhausted for a message that the transport would not carry."""
    if (size := answer.ByteSize()) > max_bytes:
        raise _too_large(size, max_bytes)


def check_prompt_logprobs(output: types_pb2.OutputParams, prompt_tokens: int, max_bytes: int) -> None:
    """The same before any work is done, for log-probabilities of the prompt that are too large whatever they are."""
    if output.HasField("prompt_logprobs"):
        size = prompt_tokens * (output.prompt_logprobs + 1) * MIN_LOGPROB_BYTES
        if size > max_bytes:
            raise _too_large(f"at least {size}", max_bytes)


def _too_large(size: object, max_bytes: int) -> ResourceExhausted:
    message = f"the answer is a message of {size} bytes and may have {max_bytes}: ask for fewer log-probabilities"
    return ResourceExhausted("ANSWER_TOO_LARGE", message, metadata={"max_message_bytes": str(max_bytes)})


def _expire(stall: asyncio.Timeout) -> None:
    if not stall.expired():
        stall.reschedule(asyncio.get_running_loop().time())
