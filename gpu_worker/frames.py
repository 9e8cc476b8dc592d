"""Frames on the pipe between face and engine: a 4-byte little-endian length, then one protobuf message."""

import asyncio
import socket
import struct

from loraplex.v1 import engine_pb2

_LENGTH = struct.Struct("<I")
# A frame is one step's outputs or one batch of commands; a longer one is a bug.
MAX_FRAME_BYTES = 256 * 1024 * 1024


def encode(message: engine_pb2.EngineCommand | engine_pb2.EngineEvent) -> bytes:
    body = message.SerializeToString()
    return _LENGTH.pack(len(body)) + body


def _length(header: bytes) -> int:
    (length,) = _LENGTH.unpack(header)
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {length} bytes; the limit is {MAX_FRAME_BYTES}")
    return int(length)


async def read_event(reader: asyncio.StreamReader) -> engine_pb2.EngineEvent | None:
    """The engine's next event; None when it closed its end."""
    try:
        header = await reader.readexactly(_LENGTH.size)
        body = await reader.readexactly(_length(header))
    except (asyncio.IncompleteReadError, ConnectionResetError):
        return None
    return engine_pb2.EngineEvent.FromString(body)


def read_command(pipe: socket.socket) -> engine_pb2.EngineCommand | None:
    """The face's next command; None when it closed its end. Blocks."""
    header = _receive(pipe, _LENGTH.size)
    if header is None:
        return None
    body = _receive(pipe, _length(header))
    return None if body is None else engine_pb2.EngineCommand.FromString(body)


def _receive(pipe: socket.socket, num_bytes: int) -> bytes | None:
    received = bytearray()
    while len(received) < num_bytes:
        try:
            part = pipe.recv(num_bytes - len(received))
        except ConnectionResetError:
            return None
        if not part:
            return None
        received += part
    return bytes(received)
