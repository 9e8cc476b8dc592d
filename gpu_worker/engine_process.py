"""The face's end of the pipe: starts the engine process, writes commands, reads events."""

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator

from common.errors import LoraplexError, Unavailable, from_proto
from gpu_worker.config import WorkerConfig, engine_arguments
from gpu_worker.frames import encode, read_event
from loraplex.v1 import engine_pb2

# Loading a large checkpoint from a cold disk takes minutes; a hung start must still end.
START_SECONDS = 1800.0


class EngineProcess:
    """A running engine. `commands` are written in order; `events` ends when the process does."""

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self._replies: dict[int, asyncio.Future[engine_pb2.MemoryReply]] = {}
        self._next_call = 0
        self._ended = False

    @classmethod
    async def start(cls, config: WorkerConfig) -> "tuple[EngineProcess, engine_pb2.EngineReady]":
        """Starts an engine and waits until it is warm.

        Raises LoraplexError with the engine's own sentence when it cannot start.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "gpu_worker.engine_main", f"--pipe={theirs.fileno()}"]
            command += [f"--log-level={config.log_level}", *engine_arguments(config)]
            process = await asyncio.create_subprocess_exec(
                *command, pass_fds=[theirs.fileno()], stdin=asyncio.subprocess.DEVNULL, env=dict(os.environ)
            )
        reader, writer = await asyncio.open_connection(sock=ours)
        engine = cls(process, reader, writer)
        try:
            async with asyncio.timeout(START_SECONDS):
                event = await read_event(reader)
            if event is None:
                raise Unavailable("ENGINE_CANNOT_START", "the engine process ended before it was ready")
            if event.HasField("failed"):
                raise from_proto(event.failed.error)
        except BaseException:
            await engine.stop()
            raise
        return engine, event.ready

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, command: engine_pb2.EngineCommand) -> None:
        """Queues a command; nothing is lost while the process lives."""
        self._writer.write(encode(command))

    async def call_memory(self, command: engine_pb2.MemoryCommand) -> engine_pb2.MemoryReply:
        """Asks the memory manager. Raises LoraplexError when it refuses, Unavailable when the engine ends."""
        if self._ended:
            raise engine_lost()
        self._next_call += 1
        command.call_id = self._next_call
        future = asyncio.get_running_loop().create_future()
        self._replies[command.call_id] = future
        self.send(engine_pb2.EngineCommand(memory=command))
        reply: engine_pb2.MemoryReply = await future
        if reply.HasField("error"):
            raise from_proto(reply.error)
        return reply

    async def events(self) -> AsyncIterator[engine_pb2.EngineEvent]:
        """Events other than memory replies, in order, until the process ends."""
        while (event := await read_event(self._reader)) is not None:
            if event.HasField("memory"):
                future = self._replies.pop(event.memory.call_id, None)
                if future is not None and not future.done():
                    future.set_result(event.memory)
            else:
                yield event
        self._ended = True
        for future in self._replies.values():
            if not future.done():
                future.set_exception(engine_lost())
        self._replies.clear()

    async def stop(self) -> None:
        """Asks the process to end, waits a little, then kills it."""
        if not self._writer.is_closing():
            self.send(engine_pb2.EngineCommand(shutdown=engine_pb2.Shutdown()))
        try:
            async with asyncio.timeout(5.0):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        self._writer.close()


def engine_lost() -> LoraplexError:
    """The engine ended; a retry finds a new one or another worker."""
    return Unavailable("ENGINE_LOST", "the worker's engine stopped and is being restarted", retry_after_seconds=1.0)
