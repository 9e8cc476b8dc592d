"""The asyncio client against the same scripted gateway."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from google.rpc import code_pb2

from loraplex import AsyncClient, LoraplexError
from tests.loraplex import fakes
from tests.loraplex.fakes import KNOWN_ADAPTERS, FakeGateway


@pytest.fixture
async def client(address: str) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(address) as client:
        yield client


async def test_generate_returns_the_whole_answer(client: AsyncClient) -> None:
    assert (await client.generate("one two", "alpha", temperature=0.0)).text == "ONE TWO"


async def test_stream_yields_deltas_in_order(client: AsyncClient) -> None:
    assert [delta.text async for delta in client.stream("one two three")] == ["one", "two", "three"]


async def test_closing_a_stream_cancels_the_request(client: AsyncClient, gateway: FakeGateway) -> None:
    gateway.holds_streams = True
    stream = client.stream("one two")
    await anext(stream)
    await stream.aclose()
    assert gateway.stream_ended.wait(fakes.HOLD_SECONDS / 2)


async def test_a_failed_call_has_reason_hint_and_request_id(client: AsyncClient, gateway: FakeGateway) -> None:
    gateway.failure = fakes.status(code_pb2.UNAVAILABLE, "DRAINING", "it stops", retry_after_seconds=2.0)
    with pytest.raises(LoraplexError) as caught:
        await client.generate("x", request_id="mine")
    assert (caught.value.reason, caught.value.retry_after_seconds, caught.value.request_id) == ("DRAINING", 2.0, "mine")


async def test_a_stream_that_breaks_raises_after_its_deltas(client: AsyncClient, gateway: FakeGateway) -> None:
    gateway.failure = fakes.status(code_pb2.UNAVAILABLE, "STREAM_BROKEN", "the worker is gone")
    gateway.words_before_failure = 1
    stream = client.stream("one two")
    assert (await anext(stream)).text == "one"
    with pytest.raises(LoraplexError, match="STREAM_BROKEN"):
        await anext(stream)


async def test_models_follows_the_pages(client: AsyncClient) -> None:
    assert [model.adapter_id for model in await client.models()] == ["", *KNOWN_ADAPTERS]


async def test_list_follows_the_pages(client: AsyncClient) -> None:
    assert [adapter.adapter_id for adapter in await client.adapters.list()] == list(KNOWN_ADAPTERS)


async def test_delete_returns_the_version(client: AsyncClient) -> None:
    assert await client.adapters.delete("alpha") == "digest"


async def test_push_sends_a_header_then_the_files(
    client: AsyncClient, gateway: FakeGateway, adapter_folder: Path
) -> None:
    result = await client.adapters.push("alpha", adapter_folder)
    header, *chunks = gateway.requests[0]
    assert (header.header.adapter_id, [message.chunk.data for message in chunks]) == ("alpha", [b"{}", b"w" * 10])
    assert result.created
