"""A bidirectional stream to one peer that is dialled again whenever it breaks."""

import asyncio
import logging
import random
from abc import ABC, abstractmethod
from typing import Generic, TypeVar, cast

import grpc

from common.channel import connect
from common.tls import PemFiles

FIRST_BACKOFF_SECONDS = 0.1
MAX_BACKOFF_SECONDS = 2.0

_log = logging.getLogger(__name__)
_Out = TypeVar("_Out")
_In = TypeVar("_In")


class IncompatiblePeer(Exception):
    """The peer serves something else than this process expects; the sentence says what."""


class Link(ABC, Generic[_Out, _In]):
    """Says hello, writes what `send()` is given, and hands over what arrives. `run()` is the only task."""

    def __init__(self, peer: str, address: str, service: str = "", tls: PemFiles | None = None) -> None:
        """With the full name of a `service`, of several addresses only those are dialled that serve it."""
        self.peer = peer
        self.address = address
        self._service = service
        self._tls = tls
        # Cleared to let the link end with its stream instead of dialling again.
        self.wanted = True
        self._outbox: asyncio.Queue[_Out] | None = None

    @abstractmethod
    def _open(self, channel: grpc.aio.Channel) -> "grpc.aio.StreamStreamCall[_Out, _In]": ...

    @abstractmethod
    def _hello(self) -> _Out: ...

    @abstractmethod
    def _received(self, message: _In) -> None:
        """Must not block. Raises IncompatiblePeer to drop the stream."""

    @abstractmethod
    def _lost(self) -> None:
        """The stream, or the attempt to open one, has ended. Called once per attempt."""

    @property
    @abstractmethod
    def established(self) -> bool:
        """The peer has welcomed this stream."""

    def send(self, message: _Out) -> bool:
        """Queues a message; False when there is no stream to take it."""
        if self._outbox is None:
            return False
        self._outbox.put_nowait(message)
        return True

    async def run(self) -> None:
        """Keeps the stream up until cancelled or no longer wanted."""
        backoff = FIRST_BACKOFF_SECONDS
        async with connect(self.address, service=self._service, tls=self._tls) as channel:
            while self.wanted:
                welcomed = await self._attempt(channel)
                backoff = FIRST_BACKOFF_SECONDS if welcomed else min(2 * backoff, MAX_BACKOFF_SECONDS)
                if self.wanted:
                    await asyncio.sleep(backoff * random.uniform(0.5, 1.0))

    async def _attempt(self, channel: grpc.aio.Channel) -> bool:
        """One stream from hello to its end; whether the peer welcomed it."""
        welcomed = False
        try:
            await self._converse(self._open(channel))
        except grpc.aio.AioRpcError as error:
            level = logging.WARNING if self.established else logging.INFO
            refused = error.code() is grpc.StatusCode.FAILED_PRECONDITION
            _log.log(logging.ERROR if refused else level, "no stream to the %s: %s", self.peer, error.details())
        except IncompatiblePeer as error:
            _log.error("the %s at %s is refused: %s", self.peer, self.address, error)
        except Exception:
            _log.exception("the stream to the %s failed", self.peer)
        finally:
            welcomed = self.established
            self._lost()
        return welcomed

    async def _converse(self, call: "grpc.aio.StreamStreamCall[_Out, _In]") -> None:
        writer = None
        try:
            await call.write(self._hello())
            self._outbox = asyncio.Queue()
            writer = asyncio.create_task(_write_all(call, self._outbox))
            while (message := await call.read()) is not grpc.aio.EOF:
                self._received(cast("_In", message))
        finally:
            self._outbox = None
            call.cancel()
            if writer is not None:
                writer.cancel()
                await asyncio.gather(writer, return_exceptions=True)


async def _write_all(call: "grpc.aio.StreamStreamCall[_Out, _In]", outbox: "asyncio.Queue[_Out]") -> None:
    while True:
        await call.write(await outbox.get())
