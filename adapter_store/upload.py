"""Receives one upload: the header, then files in chunks, into a staged adapter."""

import asyncio
from collections.abc import AsyncIterator

from adapter_store.blobs import StagedAdapter
from adapter_store.convert import FILES, MAX_CHUNK_BYTES
from adapter_store.names import check_adapter_id, check_digest, check_tenant
from adapter_store.store import Target
from common.errors import InvalidArgument
from loraplex.v1 import adapter_store_pb2 as pb


async def read_target(requests: AsyncIterator[pb.UploadAdapterRequest]) -> Target:
    """The first message of an upload. Raises InvalidArgument naming the field."""
    first = await anext(requests, None)
    if first is None or not first.HasField("header"):
        raise InvalidArgument("HEADER_MISSING", "the first message of an upload must be its header", field="header")
    header = first.header
    check_tenant(header.tenant)
    check_adapter_id(header.adapter_id)
    if header.expected_version:
        check_digest(header.expected_version, "expected_version")
        if header.replace:
            message = "expected_version and replace contradict each other; give one"
            raise InvalidArgument("EXPECTATION_AMBIGUOUS", message, field="replace")
    return Target(header.tenant, header.adapter_id, header.expected_version, header.replace)


async def receive(requests: AsyncIterator[pb.UploadAdapterRequest], staged: StagedAdapter) -> None:
    """Writes all chunks and seals the files. Raises InvalidArgument, or ResourceExhausted when the disk is full."""
    loop, writing = asyncio.get_running_loop(), None
    try:
        async for request in requests:
            name, data = _checked(request)
            if writing is not None:
                await writing
            # While it is hashed and written the next one comes in.
            writing = loop.run_in_executor(None, staged.append, name, data)
    finally:
        if writing is not None:
            await asyncio.wait([writing])
    if writing is not None:
        await writing
    staged.seal()


def _checked(request: pb.UploadAdapterRequest) -> tuple[str, bytes]:
    """Name and next bytes of a file. Raises InvalidArgument."""
    if not request.HasField("chunk"):
        raise InvalidArgument("CHUNK_MISSING", "every message after the header must be a chunk", field="chunk")
    chunk = request.chunk
    name = FILES.get(chunk.file)
    if name is None:
        message = f"file is {int(chunk.file)}; only the config, the weights and the chat template are taken"
        raise InvalidArgument("FILE_UNKNOWN", message, field="chunk.file")
    data = chunk.data
    if len(data) > MAX_CHUNK_BYTES:
        message = f"a chunk has {len(data)} bytes; the limit is {MAX_CHUNK_BYTES}"
        raise InvalidArgument("CHUNK_TOO_LARGE", message, field="chunk.data")
    return name, data
