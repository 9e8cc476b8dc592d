"""Tokens to gateways: one queue a gateway, one message a step, and the sequences that wait for them."""

import asyncio
from collections.abc import Callable, Iterable

from common.errors import LoraplexError, to_proto
from loraplex.v1 import engine_pb2, types_pb2, worker_pb2

# A gateway that has been gone for longer is dead: its sequences are freed.
GATEWAY_GRACE_SECONDS = 1.0

Key = tuple[str, int]


class GatewayStreams:
    """Knows which gateway owns which sequence, and keeps tokens for a gateway that is away for a moment."""

    def __init__(self, worker_id: str, on_lost: Callable[[str], None]) -> None:
        """`on_lost(gateway_id)` is called when a gateway's stream has been gone for the grace time."""
        self._worker_id = worker_id
        self._on_lost = on_lost
        self._queues: dict[str, asyncio.Queue[worker_pb2.TokenBatch]] = {}
        self._owned: dict[str, dict[Key, types_pb2.RequestKey]] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        # Set while no sequence is in flight.
        self.idle = asyncio.Event()
        self.idle.set()
        # Set when the worker is about to end: streams end when they have delivered what waits.
        self.closing = asyncio.Event()

    def own(self, gateway_id: str, key: types_pb2.RequestKey) -> None:
        """A sequence of this gateway was offered."""
        if gateway_id not in self._queues:
            self._queues[gateway_id] = asyncio.Queue()
            self._start_timer(gateway_id)
        self._owned.setdefault(gateway_id, {})[key.request_id, key.attempt] = key
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
                    owned.pop((sequence.key.request_id, sequence.key.attempt), None)
            if queue := self._queues.get(batch.gateway_id):
                message = worker_pb2.TokenBatch(worker_id=self._worker_id, step_number=step_number)
                message.sequences.extend(batch.sequences)
                queue.put_nowait(message)
        self._update_idle()

    def fail_all(self, error: LoraplexError) -> None:
        """The engine is gone: every sequence it had fails with `error`."""
        proto = to_proto(error)
        for gateway_id, owned in self._owned.items():
            failed = [
                worker_pb2.SequenceTokens(key=key, finish_reason=types_pb2.FINISH_REASON_ERROR, error=proto)
                for key in owned.values()
            ]
            if failed:
                batch = worker_pb2.TokenBatch(worker_id=self._worker_id, sequences=failed)
                self._queues[gateway_id].put_nowait(batch)
            owned.clear()
        self._update_idle()

    def _start_timer(self, gateway_id: str) -> None:
        loop = asyncio.get_running_loop()
        self._timers[gateway_id] = loop.call_later(GATEWAY_GRACE_SECONDS, self._lose, gateway_id)

    def _lose(self, gateway_id: str) -> None:
        self._timers.pop(gateway_id, None)
        self._queues.pop(gateway_id, None)
        self._owned.pop(gateway_id, None)
        self._update_idle()
        self._on_lost(gateway_id)

    def _update_idle(self) -> None:
        if not any(self._owned.values()):
            self.idle.set()
