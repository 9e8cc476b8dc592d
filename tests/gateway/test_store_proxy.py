"""The users' door to the adapter store."""

from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest

from loraplex.v1 import adapter_store_pb2
from tests.gateway.conftest import Fleet, failure, reason_of

MEBIBYTE = 1024 * 1024


def upload(adapter_id: str, num_chunks: int) -> Iterator[adapter_store_pb2.UploadAdapterRequest]:
    header = adapter_store_pb2.UploadHeader(tenant="somebody else", adapter_id=adapter_id, replace=True)
    yield adapter_store_pb2.UploadAdapterRequest(header=header)
    for index in range(num_chunks):
        chunk = adapter_store_pb2.UploadChunk(
            file=adapter_store_pb2.ADAPTER_FILE_WEIGHTS, data=bytes([index]) * MEBIBYTE
        )
        yield adapter_store_pb2.UploadAdapterRequest(chunk=chunk)


async def test_an_upload_passes_through_with_the_verified_tenant(fleet: Fleet) -> None:
    response = await fleet.store_api.UploadAdapter(upload("new", 8))
    assert response.created
    header, *chunks = fleet.store.uploaded
    assert (header.header.tenant, header.header.adapter_id, header.header.replace) == ("default", "new", True)
    assert chunks == list(upload("new", 8))[1:]


async def test_an_upload_that_the_store_refuses_ends_with_its_status(fleet: Fleet) -> None:
    error = await failure(fleet.store_api.UploadAdapter(upload("taken", 64)))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.ALREADY_EXISTS, "ADAPTER_EXISTS")
    assert error.details() == "the id is taken"


async def test_an_upload_without_messages_is_the_stores_to_judge(fleet: Fleet) -> None:
    await fleet.store_api.UploadAdapter(iter(()))
    assert fleet.store.uploaded == []


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("GetAdapter", adapter_store_pb2.GetAdapterRequest(tenant="other", adapter_id="alpha")),
        ("ListAdapters", adapter_store_pb2.ListAdaptersRequest(tenant="other", page_size=3)),
        ("DeleteAdapter", adapter_store_pb2.DeleteAdapterRequest(tenant="other", adapter_id="alpha")),
        ("SetAlias", adapter_store_pb2.SetAliasRequest(tenant="other", adapter_id="alpha")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_call_passes_through_with_the_verified_tenant(fleet: Fleet, method: str, request_: Any) -> None:
    await getattr(fleet.store_api, method)(request_)
    request_.tenant = "default"
    assert fleet.store.asked == [request_]


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("FetchWeights", adapter_store_pb2.FetchWeightsRequest()),
        ("WatchAdapters", adapter_store_pb2.WatchAdaptersRequest()),
    ],
    ids=["FetchWeights", "WatchAdapters"],
)
async def test_what_is_for_services_is_denied_to_users(fleet: Fleet, method: str, request_: Any) -> None:
    error = await failure(getattr(fleet.store_api, method)(request_))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.PERMISSION_DENIED, "INTERNAL_METHOD")


@pytest.mark.parametrize("num_chunks", [0, 1, 32])
async def test_a_store_that_is_away_is_unavailable_to_uploads(fleet: Fleet, num_chunks: int) -> None:
    await fleet.store.stop()
    error = await failure(fleet.store_api.UploadAdapter(upload("new", num_chunks)))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.UNAVAILABLE, "ADAPTER_STORE_UNAVAILABLE")


async def test_a_store_that_goes_away_during_an_upload_is_unavailable(fleet: Fleet) -> None:
    async def stop_the_store() -> AsyncIterator[adapter_store_pb2.UploadAdapterRequest]:
        for index, request in enumerate(upload("new", 32)):
            if index == 16:
                await fleet.store.stop()
            yield request

    error = await failure(fleet.store_api.UploadAdapter(stop_the_store()))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.UNAVAILABLE, "ADAPTER_STORE_UNAVAILABLE")


async def test_a_malformed_chunk_ends_the_upload(fleet: Fleet) -> None:
    raw: Any = fleet.channel.stream_unary("/loraplex.v1.AdapterStoreService/UploadAdapter")
    messages = [request.SerializeToString() for request in upload("new", 8)]
    error = await failure(raw(iter([*messages, b"\xff"])))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_REQUEST")


async def test_a_store_that_is_away_is_unavailable(fleet: Fleet) -> None:
    await fleet.store.stop()
    error = await failure(fleet.store_api.GetAdapter(adapter_store_pb2.GetAdapterRequest(adapter_id="alpha")))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.UNAVAILABLE, "ADAPTER_STORE_UNAVAILABLE")


async def test_an_export_passes_through_with_the_verified_tenant(fleet: Fleet) -> None:
    request = adapter_store_pb2.ExportAdapterRequest(tenant="other", adapter_id="alpha")
    responses = [response async for response in fleet.store_api.ExportAdapter(request)]
    assert [response.adapter.adapter_id for response in responses] == ["alpha"]
    request.tenant = "default"
    assert fleet.store.asked == [request]


async def test_an_export_of_a_store_that_is_away_is_unavailable(fleet: Fleet) -> None:
    await fleet.store.stop()
    error = await failure(fleet.store_api.ExportAdapter(adapter_store_pb2.ExportAdapterRequest(adapter_id="alpha")))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.UNAVAILABLE, "ADAPTER_STORE_UNAVAILABLE")
