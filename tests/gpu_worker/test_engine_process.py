"""The face's end of the pipe: answers find their callers, and nobody waits for an engine that has ended."""

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest

from common.errors import FailedPrecondition, LoraplexError, NotFound, Unavailable, to_proto
from gpu_worker.config import WorkerConfig
from gpu_worker.engine_process import EngineProcess
from gpu_worker.frames import encode
from loraplex.v1 import engine_pb2

USAGE = engine_pb2.MemoryCommand(get_usage=engine_pb2.GetUsageCommand())


class Pipe:
    """The engine's end: the test writes events, and sees the commands."""

    def __init__(self) -> None:
        self.reader = asyncio.StreamReader()
        self.commands: list[bytes] = []
        self.engine = EngineProcess(cast("asyncio.subprocess.Process", None), self.reader, cast("Any", self))

    def write(self, frame: bytes) -> None:
        self.commands.append(frame)

    def answer(self, reply: engine_pb2.MemoryReply) -> None:
        self.reader.feed_data(encode(engine_pb2.EngineEvent(memory=reply)))

    async def end(self) -> list[engine_pb2.EngineEvent]:
        self.reader.feed_eof()
        return [event async for event in self.engine.events()]

    async def ask(self) -> asyncio.Task[engine_pb2.MemoryReply]:
        """A call that has been sent."""
        sent = len(self.commands)
        task = asyncio.create_task(self.engine.call_memory(USAGE))
        await asyncio.wait([task], timeout=0)
        assert len(self.commands) == sent + 1
        return task


@pytest.fixture
async def pipe() -> Pipe:
    return Pipe()


async def test_events_come_in_order(pipe: Pipe) -> None:
    steps = [engine_pb2.EngineEvent(step=engine_pb2.StepResult(step_number=number)) for number in (1, 2)]
    for step in steps:
        pipe.reader.feed_data(encode(step))
    assert await pipe.end() == steps


async def test_an_answer_finds_its_caller(pipe: Pipe) -> None:
    first, second = await pipe.ask(), await pipe.ask()
    for call_id in (2, 1):
        pipe.answer(engine_pb2.MemoryReply(call_id=call_id, freed_pages=10 * call_id))
    await pipe.end()
    assert [(await first).freed_pages, (await second).freed_pages] == [10, 20]


async def test_an_answer_is_not_an_event(pipe: Pipe) -> None:
    pipe.answer(engine_pb2.MemoryReply(call_id=9))
    assert await pipe.end() == []


async def test_a_refusal_is_raised(pipe: Pipe) -> None:
    call = await pipe.ask()
    pipe.answer(engine_pb2.MemoryReply(call_id=1, error=to_proto(NotFound("ADAPTER_NOT_RESIDENT", "not here"))))
    await pipe.end()
    with pytest.raises(NotFound, match="not here"):
        await call


async def test_a_call_in_flight_fails_when_the_engine_ends(pipe: Pipe) -> None:
    call = await pipe.ask()
    await pipe.end()
    with pytest.raises(Unavailable, match="is being restarted"):
        await call


async def test_a_call_after_the_end_fails_at_once(pipe: Pipe) -> None:
    await pipe.end()
    with pytest.raises(Unavailable, match="is being restarted"):
        await pipe.engine.call_memory(USAGE)


async def start(model: Path, **options: Any) -> LoraplexError:
    config = WorkerConfig(model=model, scheduler="nobody", adapter_store="nobody", **options)
    with pytest.raises(LoraplexError) as refused:
        await EngineProcess.start(config)
    return refused.value


async def test_an_engine_that_cannot_start_says_why(tiny_checkpoint: Path) -> None:
    error = await start(tiny_checkpoint, memory="1KiB")
    assert isinstance(error, FailedPrecondition)
    assert error.message.startswith("memory is 1KiB; one page of 16 tokens takes 4096 bytes")
