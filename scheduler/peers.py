"""What waits to be written to a gateway or to a worker: one queue and one writer per stream."""

import asyncio
from collections.abc import AsyncIterator
from typing import Generic, TypeVar

from common.errors import LoraplexError
from loraplex.v1 import scheduler_pb2

_Message = TypeVar("_Message")


class Peer(Generic[_Message]):
    """The sending side of one stream.

    The queue is bounded by what the core has decided: one answer for each submission, and commands for what a worker
    can hold. A peer that stops reading gets no new work.
    """

    def __init__(self, peer_id: str) -> None:
        self.peer_id = peer_id
        self._queue: asyncio.Queue[_Message | None] = asyncio.Queue()
        self._error: LoraplexError | None = None

    def send(self, message: _Message) -> None:
        self._queue.put_nowait(message)

    def close(self, error: LoraplexError | None = None) -> None:
        """Ends the stream after what was sent so far, with `error` if there is one."""
        self._error = self._error or error
        self._queue.put_nowait(None)

    async def messages(self) -> AsyncIterator[_Message]:
        """Everything sent until the peer is closed. Raises the error it was closed with."""
        while (message := await self._queue.get()) is not None:
            yield message
        if self._error is not None:
            raise self._error


class GatewayPeer(Peer[scheduler_pb2.ConnectResponse]):
    """A connected gateway."""


class WorkerPeer(Peer[scheduler_pb2.RegisterResponse]):
    """A registered worker and what it says of itself that the core does not need."""

    def __init__(self, hello: scheduler_pb2.WorkerHello, scheduler_epoch: int) -> None:
        super().__init__(hello.worker_id)
        self.scheduler_epoch = scheduler_epoch
        self.capacity = hello.capacity
        self.memory = hello.memory
        self.info = scheduler_pb2.WorkerInfo(
            worker_id=hello.worker_id,
            address=hello.address,
            state=scheduler_pb2.WORKER_STATE_READY,
            model=hello.model,
        )
