import hashlib
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from adapter_store.service import StoreService
from common.errors import DataLoss, InvalidArgument
from loraplex.v1 import types_pb2
from tests.adapter_store.crafted import Tensors, make_files, make_tensors
from tests.adapter_store.fakes import MIB, StoreClient
from tests.adapter_store.tiny_base import SHAPES

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture
def client(shared_client: StoreClient) -> StoreClient:
    return shared_client


async def put(client: StoreClient, tensors: Tensors | None = None, lora_rank: int = 3) -> str:
    return (await client.upload("a", make_files(tensors=tensors, r=lora_rank))).adapter.adapter_version


@pytest_asyncio.fixture(loop_scope="module")
async def large(client: StoreClient) -> str:
    """A version whose packed string is over two chunks."""
    return await put(client, make_tensors(lora_rank=4000), lora_rank=4000)


async def test_the_layout_comes_first_with_the_sha256_of_the_bytes(client: StoreClient) -> None:
    fetched = await client.fetch(await put(client))
    assert fetched.layout.total_bytes == fetched.data.size
    assert fetched.layout.sha256 == hashlib.sha256(fetched.data.tobytes()).hexdigest()
    in_features, out_features = SHAPES["q_proj"]
    module = fetched.layout.modules[0]
    assert (module.layer, module.module, module.start_unit) == (1, types_pb2.LORA_MODULE_Q_PROJ, 0)
    assert (module.lora_rank, module.in_features, module.out_features) == (3, in_features, out_features)
    assert module.scaling == 2.0


async def test_packed_bytes_of_the_adapter_are_those_of_the_string(client: StoreClient) -> None:
    fetched = await client.fetch(await put(client))
    assert (await client.get("a")).packed_bytes == fetched.data.size


async def test_chunks_are_at_most_one_mib_and_say_where_they_are(client: StoreClient, large: str) -> None:
    fetched = await client.fetch(large)
    assert len(fetched.chunks) > 2
    assert {len(chunk.data) for chunk in fetched.chunks[:-1]} == {MIB}
    assert [chunk.offset_bytes for chunk in fetched.chunks] == [i * MIB for i in range(len(fetched.chunks))]
    assert fetched.layout.sha256 == hashlib.sha256(fetched.data.tobytes()).hexdigest()


@pytest.mark.parametrize("offset_bytes", [1, 4095, MIB, MIB + 77])
async def test_a_broken_fetch_goes_on_from_an_offset(client: StoreClient, large: str, offset_bytes: int) -> None:
    whole, rest = await client.fetch(large), await client.fetch(large, offset_bytes=offset_bytes)
    assert rest.layout == whole.layout
    assert rest.chunks[0].offset_bytes == offset_bytes
    np.testing.assert_array_equal(rest.data, whole.data[offset_bytes:])


async def test_the_offset_at_the_end_gives_the_layout_only(client: StoreClient) -> None:
    version = await put(client)
    total_bytes = (await client.fetch(version)).layout.total_bytes
    assert (await client.fetch(version, offset_bytes=total_bytes)).chunks == []


async def test_an_offset_after_the_end_is_refused(client: StoreClient) -> None:
    version = await put(client)
    total_bytes = (await client.fetch(version)).layout.total_bytes
    with pytest.raises(InvalidArgument, match=f"the packed string has {total_bytes} bytes"):
        await client.fetch(version, offset_bytes=total_bytes + 1)


async def test_the_own_dtype_may_be_named(client: StoreClient) -> None:
    version = await put(client)
    fetched = await client.fetch(version, dtype=types_pb2.DTYPE_FLOAT32, tp_size=1)
    assert fetched.layout.dtype == types_pb2.DTYPE_FLOAT32


async def test_an_unknown_dtype_is_refused(client: StoreClient) -> None:
    version = await put(client)
    with pytest.raises(InvalidArgument, match="dtype 99 is unknown"):
        await client.fetch(version, dtype=types_pb2.Dtype.ValueType(99))


async def test_a_tp_rank_outside_of_its_group_is_refused(client: StoreClient) -> None:
    version = await put(client)
    with pytest.raises(InvalidArgument, match="tp_rank is 1; it must be below tp_size"):
        await client.fetch(version, tp_size=1, tp_rank=1)


async def test_a_cut_file_is_data_loss(client: StoreClient, shared_data_dir: Path) -> None:
    version = await put(client, make_tensors(seed=1))
    packed = shared_data_dir / "objects" / version / "packed.float32"
    packed.chmod(0o600)
    packed.write_bytes(packed.read_bytes()[:-1])
    with pytest.raises(DataLoss, match="damaged"):
        await client.fetch(version)


async def test_a_link_in_place_of_a_file_is_data_loss(
    client: StoreClient, shared_data_dir: Path, tmp_path: Path
) -> None:
    version = await put(client, make_tensors(seed=2))
    packed = shared_data_dir / "objects" / version / "packed.float32"
    elsewhere = packed.rename(tmp_path / "elsewhere")
    packed.symlink_to(elsewhere)
    with pytest.raises(DataLoss):
        await client.fetch(version)


async def test_sent_bytes_are_counted(client: StoreClient, shared_service: StoreService) -> None:
    def sample(name: str) -> float:
        return shared_service.server.registry.get_sample_value(name, {"result": "ok"}) or 0.0

    version = await put(client)
    bytes_before, fetches_before = (sample(f"loraplex_store_fetch_{name}") for name in ("bytes_total", "seconds_count"))
    fetched = await client.fetch(version)
    assert sample("loraplex_store_fetch_bytes_total") == bytes_before + fetched.data.size
    assert sample("loraplex_store_fetch_seconds_count") == fetches_before + 1
