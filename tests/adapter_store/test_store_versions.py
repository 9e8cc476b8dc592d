"""Ids move, versions do not; nobody sees what is another tenant's."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from common.errors import Conflict, InvalidArgument, NotFound
from tests.adapter_store.crafted import make_files
from tests.adapter_store.fakes import StoreClient

UNKNOWN = "0" * 64


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture
def client(shared_client: StoreClient) -> StoreClient:
    return shared_client


async def put(client: StoreClient, adapter_id: str, seed: int = 0, **options: str) -> str:
    return (await client.upload(adapter_id, make_files(seed), replace=True, **options)).adapter.adapter_version


async def test_an_upload_with_the_expected_version_moves_the_id(client: StoreClient) -> None:
    first = await put(client, "a", 0)
    response = await client.upload("a", make_files(1), expected_version=first)
    assert (await client.get("a")).adapter_version == response.adapter.adapter_version != first


async def test_an_upload_that_expected_another_version_is_a_conflict(client: StoreClient) -> None:
    first = await put(client, "a", 0)
    with pytest.raises(Conflict, match=f"points to {first}, not to the expected {UNKNOWN}"):
        await client.upload("a", make_files(1), expected_version=UNKNOWN)
    assert (await client.get("a")).adapter_version == first


async def test_an_upload_that_expected_a_version_of_no_id_is_a_conflict(client: StoreClient) -> None:
    with pytest.raises(Conflict, match="does not exist"):
        await client.upload("a", make_files(), expected_version=UNKNOWN)


async def test_an_upload_may_be_retried_after_it_moved_the_id(client: StoreClient) -> None:
    first = await put(client, "a", 0)
    await client.upload("a", make_files(1), expected_version=first)
    assert not (await client.upload("a", make_files(1), expected_version=first)).created


async def test_of_two_uploads_at_once_one_wins(client: StoreClient) -> None:
    uploads = [client.upload("a", make_files(seed)) for seed in range(2)]
    results = await asyncio.gather(*uploads, return_exceptions=True)
    assert sorted(type(result).__name__ for result in results) == ["AlreadyExists", "UploadAdapterResponse"]


async def test_set_alias_moves_an_id(client: StoreClient) -> None:
    first, second = await put(client, "a", 0), await put(client, "b", 1)
    adapter = await client.set_alias("a", second, expected_version=first)
    assert (adapter.adapter_id, adapter.adapter_version) == ("a", second)
    assert (await client.get("a")).adapter_version == second


async def test_set_alias_makes_an_id(client: StoreClient) -> None:
    version = await put(client, "a")
    await client.set_alias("b", version)
    assert (await client.get("b")).adapter_version == version


async def test_set_alias_back_to_a_version_of_before(client: StoreClient) -> None:
    first, second = await put(client, "a", 0), await put(client, "a", 1)
    await client.set_alias("a", first, expected_version=second)
    assert (await client.get("a")).adapter_version == first


@pytest.mark.parametrize("expected_version", ["", UNKNOWN], ids=["expected-none", "expected-another"])
async def test_set_alias_that_expected_something_else_is_a_conflict(client: StoreClient, expected_version: str) -> None:
    first, second = await put(client, "a", 0), await put(client, "b", 1)
    with pytest.raises(Conflict):
        await client.set_alias("a", second, expected_version=expected_version)
    assert (await client.get("a")).adapter_version == first


async def test_set_alias_to_an_unknown_version_is_not_found(client: StoreClient) -> None:
    with pytest.raises(NotFound, match=f"adapter version {UNKNOWN} not found"):
        await client.set_alias("a", UNKNOWN)


async def test_a_former_version_is_found_by_name_within_the_grace(client: StoreClient) -> None:
    first = await put(client, "a", 0)
    await put(client, "a", 1)
    assert (await client.get("a", first)).adapter_version == first


async def test_a_version_of_another_id_is_not_found_under_this_one(client: StoreClient) -> None:
    await put(client, "a", 0)
    other = await put(client, "b", 1)
    with pytest.raises(NotFound):
        await client.get("a", other)


@pytest.mark.parametrize("version", ["x", "0" * 63, "../" + "0" * 61, "A" * 64])
async def test_a_version_that_is_no_sha256_is_refused(client: StoreClient, version: str) -> None:
    with pytest.raises(InvalidArgument, match="64 lower-case hex digits"):
        await client.get("a", version)


async def test_pages_are_sorted_and_complete(client: StoreClient) -> None:
    for adapter_id in ("c", "a", "b", "b.1", "0"):
        await put(client, adapter_id)
    seen, token = [], ""
    while True:
        page = await client.page(2, token)
        seen.append([adapter.adapter_id for adapter in page.adapters])
        if not (token := page.next_page_token):
            break
    assert seen == [["0", "a"], ["b", "b.1"], ["c"]]


async def test_a_page_that_ends_with_the_last_adapter_has_no_token(client: StoreClient) -> None:
    await put(client, "a")
    assert (await client.page(1)).next_page_token == ""


async def test_a_page_is_no_larger_than_its_limit(client: StoreClient) -> None:
    with pytest.raises(InvalidArgument, match="page_size must be at most 1000; it is 1001"):
        await client.page(1001)


async def test_another_tenants_adapter_looks_like_an_unknown_one(client: StoreClient) -> None:
    version = await put(client, "a")
    calls: dict[str, Callable[[str], Awaitable[object]]] = {
        "get": lambda tenant: client.get("a", tenant=tenant),
        "get-version": lambda tenant: client.get("a", version, tenant=tenant),
        "delete": lambda tenant: client.delete("a", tenant=tenant),
        "fetch": lambda tenant: client.fetch(version, tenant=tenant),
        "alias": lambda tenant: client.set_alias("b", version, tenant=tenant),
    }
    for call in calls.values():
        with pytest.raises(NotFound) as foreign:
            await call("evil")
        await put(client, "elsewhere", 9, tenant="third")
        with pytest.raises(NotFound) as unknown:
            await call("third")
        assert (foreign.value.message, foreign.value.metadata) == (unknown.value.message, unknown.value.metadata)
    assert list((await client.page(tenant="evil")).adapters) == []


async def test_tenants_use_the_same_id_for_different_adapters(client: StoreClient) -> None:
    first, second = await put(client, "a", 0), await put(client, "a", 1, tenant="other")
    assert ((await client.get("a")).adapter_version, (await client.get("a", tenant="other")).adapter_version) == (
        first,
        second,
    )


async def test_delete_removes_the_id_at_once(client: StoreClient) -> None:
    version = await put(client, "a")
    assert await client.delete("a", expected_version=version) == version
    with pytest.raises(NotFound, match="adapter 'a' not found"):
        await client.get("a")
    assert list((await client.page()).adapters) == []


async def test_delete_that_expected_another_version_is_a_conflict(client: StoreClient) -> None:
    await put(client, "a")
    with pytest.raises(Conflict):
        await client.delete("a", expected_version=UNKNOWN)
    assert (await client.get("a")).adapter_id == "a"


async def test_delete_of_an_unknown_id_is_not_found(client: StoreClient) -> None:
    with pytest.raises(NotFound, match="adapter 'a' not found"):
        await client.delete("a")
