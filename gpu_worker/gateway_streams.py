"""Tokens to gateways: one queue a gateway, one message a step, and the sequences that wait for them."""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from common.errors import LoraplexError, Unavailable, to_proto
from loraplex.v1 import engine_pb2, types_pb2, worker_pb2

# A gateway that has been gone for longer is dead: its sequences are freed.
GATEWAY_GRACE_SECONDS = 1.0
# How long a gateway that comes late can still learn what was freed meanwhile.
DROPPED_SECONDS = 60.0

Key = tuple[str, int]


@dataclass(slots=True)
class _Owned:
    """A request of a gateway and how many of its outputs have not ended."""

    key: types_pb2.RequestKey
    outputs: int


class GatewayStreams:
    """Knows which gateway owns which sequence, and keeps tokens for a gateway that is away for a moment."""

    def __init__(self, worker_id: str, on_lost: Callable[[str], None]) -> None:
        """`on_lost(gateway_id)` is called when a gateway's stream has been gone for the grace time."""
        self._worker_id = worker_id
        self._on_lost = on_lost
        self._queues: dict[str, asyncio.Queue[worker_pb2.TokenBatch]] = {}
        self._owned: dict[str, dict[Key, _Owned]] = {}
        # Requests freed because their gateway was away; it hears of them if it comes after all.
        self._dropped: dict[str, list[types_pb2.RequestKey]] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        # Set while no sequence is in flight.
        self.idle = asyncio.Event()
        self.idle.set()
        # Set when the worker is about to end: streams end when they have delivered what waits.
        self.closing = asyncio.Event()

    def own(self, gateway_id: str, key: types_pb2.RequestKey, outputs: int = 1) -> None:
        """A request of this gateway was offered; it ends with the last of its outputs."""
        if gateway_id not in self._queues:
            self._queues[gateway_id] = asyncio.Queue()
            self._start_timer(gateway_id)
        self._owned.setdefault(gateway_id, {})[key.request_id, key.attempt] = _Owned(key, outputs)
        self.idle.clear()

    def release(self, keys: Iterable[types_pb2.RequestKey]) -> None:
        """Sequences that the scheduler took back: no token of theirs will come."""
        for key in keys:
            for owned in self._owned.values():
                owned.pop((key.request_id, key.attempt), None)
        self._update_idle()

    def attach(self, gateway_id: str) -> asyncio.Queue[worker_pb2.TokenBatch]:
        """The gateway's stream is open: what waited for it and what comes is in the queue, until it attaches again."""
        if timer := self._timers.pop(gateway_id, None):
            timer.cancel()
        queue: asyncio.Queue[worker_pb2.TokenBatch] = asyncio.Queue()
        # A stream that is dead without knowing must not take tokens from its successor.
        if previous := self._queues.get(gateway_id):
            while not previous.empty():
                queue.put_nowait(previous.get_nowait())
        self._queues[gateway_id] = queue
        if dropped := self._dropped.pop(gateway_id, None):
            queue.put_nowait(self._failed(dropped, _dropped_error()))
        return queue

    def detach(self, gateway_id: str, queue: asyncio.Queue[worker_pb2.TokenBatch]) -> None:
        """The stream that read `queue` ended; the gateway may be back within the grace time."""
        if self._queues.get(gateway_id) is queue and gateway_id not in self._timers:
            self._start_timer(gateway_id)

    def deliver(self, step_number: int, batches: Iterable[engine_pb2.GatewayTokens]) -> None:
        """One message to each gateway that has tokens in this step."""
        for batch in batches:
            owned = self._owned.get(batch.gateway_id, {})
            for sequence in batch.sequences:
                if sequence.finish_reason:
                    _end_output(owned, sequence)
            if queue := self._queues.get(batch.gateway_id):
                message = worker_pb2.TokenBatch(worker_id=self._worker_id, step_number=step_number)
                message.sequences.extend(batch.sequences)
                queue.put_nowait(message)
        self._update_idle()

    def fail_all(self, error: LoraplexError) -> None:
        """The engine is gone: every sequence it had fails with `error`."""
        for gateway_id, owned in self._owned.items():
            if owned:
                self._queues[gateway_id].put_nowait(self._failed([item.key for item in owned.values()], error))
            owned.clear()
        self._update_idle()

    def _start_timer(self, gateway_id: str) -> None:
        loop = asyncio.get_running_loop()
        self._timers[gateway_id] = loop.call_later(GATEWAY_GRACE_SECONDS, self._lose, gateway_id)

    def _lose(self, gateway_id: str) -> None:
        self._timers.pop(gateway_id, None)
        self._queues.pop(gateway_id, None)
        if owned := self._owned.pop(gateway_id, None):
            self._dropped[gateway_id] = [item.key for item in owned.values()]
            asyncio.get_running_loop().call_later(DROPPED_SECONDS, self._dropped.pop, gateway_id, None)
        self._update_idle()
        self._on_lost(gateway_id)

    def _failed(self, keys: Iterable[types_pb2.RequestKey], error: LoraplexError) -> worker_pb2.TokenBatch:
        reason, proto = types_pb2.FINISH_REASON_ERROR, to_proto(error)
        failed = [worker_pb2.SequenceTokens(key=key, finish_reason=reason, error=proto) for key in keys]
        return worker_pb2.TokenBatch(worker_id=self._worker_id, sequences=failed)

    def _update_idle(self) -> None:
        if not any(self._owned.values()):
            self.idle.set()


def _end_output(owned: dict[Key, _Owned], sequence: worker_pb2.SequenceTokens) -> None:
    key = sequence.key.request_id, sequence.key.attempt
    if (item := owned.get(key)) is not None:
        item.outputs -= 1
        if item.outputs <= 0 or sequence.finish_reason == types_pb2.FINISH_REASON_ERROR:
            del owned[key]


def _dropped_error() -> LoraplexError:
    message = "the worker freed the request because the gateway's stream was not there"
    return Unavailable("WORKER_LOST", message, retry_after_seconds=1.0)
