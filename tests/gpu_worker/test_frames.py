"""Frames on the pipe: whole messages or the end, however the bytes are cut."""

import asyncio
import socket
import struct
from collections.abc import Iterator

import pytest

from gpu_worker.frames import MAX_FRAME_BYTES, encode, read_command, read_event
from loraplex.v1 import engine_pb2

EVENT = engine_pb2.EngineEvent(step=engine_pb2.StepResult(step_number=7))
COMMAND = engine_pb2.EngineCommand(gateway_lost=engine_pb2.GatewayLost(gateway_id="g" * 100))


def reader_of(*parts: bytes) -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    for part in parts:
        reader.feed_data(part)
    reader.feed_eof()
    return reader


@pytest.fixture
def pipe() -> Iterator[tuple[socket.socket, socket.socket]]:
    """(face's end, engine's end)"""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def test_a_frame_is_its_length_and_its_message() -> None:
    body = EVENT.SerializeToString()
    assert encode(EVENT) == struct.pack("<I", len(body)) + body


async def test_events_come_in_order_until_the_end() -> None:
    reader = reader_of(encode(EVENT), encode(engine_pb2.EngineEvent()))
    assert [await read_event(reader) for _ in range(3)] == [EVENT, engine_pb2.EngineEvent(), None]


@pytest.mark.parametrize("cut", range(1, 6))
async def test_an_event_arrives_in_pieces(cut: int) -> None:
    frame = encode(EVENT)
    assert await read_event(reader_of(frame[:cut], frame[cut:])) == EVENT


@pytest.mark.parametrize("length", [2, 4, 5], ids=["header", "no-body", "body"])
async def test_half_an_event_is_the_end(length: int) -> None:
    assert await read_event(reader_of(encode(EVENT)[:length])) is None


async def test_a_frame_above_the_limit_is_a_bug() -> None:
    with pytest.raises(ValueError, match=f"the limit is {MAX_FRAME_BYTES}"):
        await read_event(reader_of(struct.pack("<I", MAX_FRAME_BYTES + 1)))


def test_commands_come_in_order_until_the_end(pipe: tuple[socket.socket, socket.socket]) -> None:
    face, engine = pipe
    face.sendall(encode(COMMAND) + encode(engine_pb2.EngineCommand()))
    face.close()
    assert [read_command(engine) for _ in range(3)] == [COMMAND, engine_pb2.EngineCommand(), None]


@pytest.mark.parametrize("length", [2, 4, 50], ids=["header", "no-body", "body"])
def test_half_a_command_is_the_end(pipe: tuple[socket.socket, socket.socket], length: int) -> None:
    face, engine = pipe
    face.sendall(encode(COMMAND)[:length])
    face.close()
    assert read_command(engine) is None
