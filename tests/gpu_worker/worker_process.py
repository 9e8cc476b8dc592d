"""A real worker process between a scheduler, a store and a gateway of a few lines each."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from common.channel import connect
from common.version import PROTOCOL_VERSION
from loraplex.v1 import memory_pb2, memory_pb2_grpc, scheduler_pb2, worker_pb2, worker_pb2_grpc
from tests.gpu_worker.neighbours import FakeScheduler

ROOT = Path(__file__).resolve().parents[2]
# Two processes start, one of them with torch, on busy cores.
DEADLINE_SECONDS = 100.0

Attach = "grpc.aio.StreamStreamCall[worker_pb2.AttachRequest, worker_pb2.AttachResponse]"


@dataclass
class WorkerProcess:
    """A running `python -m gpu_worker`, registered with its scheduler."""

    process: asyncio.subprocess.Process
    hello: scheduler_pb2.WorkerHello
    channel: grpc.aio.Channel

    @property
    def engine_pid(self) -> int:
        (pid,) = children(self.process.pid)
        return pid

    async def usage(self) -> memory_pb2.GetUsageResponse:
        stub = memory_pb2_grpc.MemoryServiceStub(self.channel)
        return await stub.GetUsage(memory_pb2.GetUsageRequest(), wait_for_ready=True)

    async def usage_when(self, condition: Callable[[memory_pb2.GetUsageResponse], bool]) -> memory_pb2.GetUsageResponse:
        """Asks until the answer satisfies `condition`."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not condition(usage := await self.usage()):
                pass
        return usage

    @contextlib.asynccontextmanager
    async def attached(self, gateway_id: str = "gateway") -> AsyncIterator["Gateway"]:
        """A gateway's stream; leaving closes it."""
        call = worker_pb2_grpc.WorkerServiceStub(self.channel).Attach()
        hello = worker_pb2.AttachHello(gateway_id=gateway_id, protocol_version=PROTOCOL_VERSION)
        await call.write(worker_pb2.AttachRequest(hello=hello))
        async with asyncio.timeout(DEADLINE_SECONDS):
            first = await call.read()
        assert isinstance(first, worker_pb2.AttachResponse)
        try:
            yield Gateway(call, first.welcome)
        finally:
            call.cancel()


@dataclass
class Gateway:
    """What one gateway hears on its stream."""

    call: Any
    welcome: worker_pb2.AttachWelcome

    async def next(self) -> list[worker_pb2.SequenceTokens]:
        """The next message of the worker; nothing when the stream has ended."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            message = await self.call.read()
        return [] if message is grpc.aio.EOF else list(message.tokens.sequences)

    async def until_finished(self) -> tuple[list[int], worker_pb2.SequenceTokens]:
        """Tokens of the one sequence in flight, and its last message."""
        tokens: list[int] = []
        while True:
            for message in await self.next():
                tokens += message.token_ids
                if message.finish_reason:
                    return tokens, message


@contextlib.asynccontextmanager
async def started(
    checkpoint: Path, cache: Path, address: str, scheduler: FakeScheduler, *options: str
) -> AsyncIterator[WorkerProcess]:
    """Starts a worker and waits until it has registered; ends both of its processes."""
    command = [sys.executable, "-m", "gpu_worker", f"--model={checkpoint}", f"--cache-dir={cache}"]
    command += [f"--scheduler={address}", f"--adapter-store={address}", "--worker-id=w", "--drain-seconds=20"]
    command += ["--memory=200KiB", "--page-size=4", "--log-level=error", *options]
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=asyncio.subprocess.PIPE)
    pids = {process.pid}
    try:
        async with asyncio.timeout(DEADLINE_SECONDS):
            hello = await scheduler.hellos.get()
        pids |= children(process.pid)
        async with connect(hello.address) as channel:
            yield WorkerProcess(process, hello, channel)
    finally:
        pids |= children(process.pid)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await process.communicate()


def children(pid: int) -> set[int]:
    """Processes whose parent is `pid`; none when it has ended."""
    try:
        return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()}
    except FileNotFoundError:
        return set()


def has_ended(pid: int) -> bool:
    """Gone, or a zombie that only waits to be reaped."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return True
    return status.rpartition(")")[2].split()[0] in "XZ"


def libraries(pid: int) -> str:
    """The names of the files mapped into a process."""
    return Path(f"/proc/{pid}/maps").read_text(encoding="utf-8")
