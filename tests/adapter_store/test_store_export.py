import json
from pathlib import Path

import pytest

from adapter_store.blobs import CHAT_TEMPLATE, WEIGHTS
from common.errors import DataLoss, NotFound
from tests.adapter_store.crafted import make_files, make_tensors
from tests.adapter_store.fakes import MIB, StoreClient

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture
def client(shared_client: StoreClient) -> StoreClient:
    return shared_client


async def test_what_was_uploaded_comes_back(client: StoreClient) -> None:
    files = make_files() | {CHAT_TEMPLATE: b"{{ messages }}"}
    adapter = (await client.upload("a", files)).adapter
    assert await client.export("a") == (adapter, files)


async def test_a_large_file_comes_in_chunks(client: StoreClient) -> None:
    files = make_files(tensors=make_tensors(lora_rank=2000), r=2000)
    assert len(files[WEIGHTS]) > MIB
    await client.upload("a", files)
    assert (await client.export("a"))[1] == files


async def test_a_former_version_comes_back_within_the_grace(client: StoreClient) -> None:
    first = await client.upload("a", make_files())
    await client.upload("a", make_files(1), replace=True)
    assert (await client.export("a", first.adapter.adapter_version))[1] == make_files()


async def test_another_tenants_adapter_is_not_found(client: StoreClient) -> None:
    await client.upload("a", make_files())
    with pytest.raises(NotFound, match="adapter 'a' not found"):
        await client.export("a", tenant="other")


async def test_damaged_files_are_data_loss(client: StoreClient, shared_data_dir: Path) -> None:
    version = (await client.upload("a", make_files(7))).adapter.adapter_version
    weights = shared_data_dir / "objects" / version / WEIGHTS
    weights.chmod(0o600)
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(DataLoss):
        await client.export("a")


async def test_a_damaged_manifest_is_data_loss(client: StoreClient, shared_data_dir: Path) -> None:
    version = (await client.upload("a", make_files(8))).adapter.adapter_version
    manifest = shared_data_dir / "objects" / version / "manifest.json"
    manifest.chmod(0o600)
    manifest.write_text(json.dumps([]))
    with pytest.raises(DataLoss):
        await client.export("a")
