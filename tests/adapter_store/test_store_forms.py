"""Packed strings in another dtype, and parts of them for tensor-parallel ranks."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from adapter_store.weights import ELEMENTS
from common.errors import DataLoss, FailedPrecondition, InvalidArgument
from common.packing import COLUMN_PARALLEL, MODULES, unpack
from common.wire import dtype_to_proto, layout_from_proto
from tests.adapter_store.crafted import Tensors, make_files, make_tensors, tensor_name
from tests.adapter_store.fakes import Fetched, StoreClient
from tests.adapter_store.tiny_base import SHAPES

pytestmark = pytest.mark.asyncio(loop_scope="module")

Weights = dict[tuple[int, str], tuple[npt.NDArray[Any], npt.NDArray[Any]]]


@pytest.fixture
def client(shared_client: StoreClient) -> StoreClient:
    return shared_client


async def put(client: StoreClient, tensors: Tensors) -> str:
    files = make_files(tensors=tensors, target_modules=list(MODULES))
    return (await client.upload("a", files, replace=True)).adapter.adapter_version


def weights_of(fetched: Fetched) -> Weights:
    layout = layout_from_proto(fetched.layout)
    assert layout.sha256 == hashlib.sha256(fetched.data.tobytes()).hexdigest()
    return unpack(layout, fetched.data, ELEMENTS[layout.dtype])


async def test_an_adapter_comes_in_another_dtype(client: StoreClient) -> None:
    tensors = make_tensors(modules=MODULES)
    fetched = await client.fetch(await put(client, tensors), dtype=dtype_to_proto("bfloat16"))
    assert fetched.layout.dtype == dtype_to_proto("bfloat16")
    for (layer, module), parts in weights_of(fetched).items():
        for part, bits in zip("AB", parts, strict=True):
            expected = torch.from_numpy(tensors[tensor_name(layer, module, part)]).bfloat16()
            np.testing.assert_array_equal(bits, expected.view(torch.uint16).numpy())


async def test_a_dtype_that_cannot_hold_it_is_refused(client: StoreClient) -> None:
    tensors = make_tensors(1)
    tensors[tensor_name(1, "q_proj", "A")][0, 0] = 1e6
    version = (await client.upload("large", make_files(tensors=tensors))).adapter.adapter_version
    with pytest.raises(FailedPrecondition, match=r"q_proj of layer 1: a value is too large for float16"):
        await client.fetch(version, dtype=dtype_to_proto("float16"))


@pytest.mark.parametrize("tp_size", [2, 4])
async def test_the_parts_of_all_ranks_make_the_whole(client: StoreClient, tp_size: int) -> None:
    tensors = make_tensors(2, modules=MODULES)
    version = await put(client, tensors)
    shards = [weights_of(await client.fetch(version, tp_rank=rank, tp_size=tp_size)) for rank in range(tp_size)]
    for module in SHAPES:
        a, b = ([shard[1, module][part] for shard in shards] for part in (0, 1))
        if module in COLUMN_PARALLEL:
            whole_a, whole_b = a[0], np.concatenate(b)
            assert all(np.array_equal(part, whole_a) for part in a)
        else:
            whole_a, whole_b = np.concatenate(a, axis=1), b[0]
            assert all(np.array_equal(part, whole_b) for part in b)
        np.testing.assert_array_equal(whole_a, tensors[tensor_name(1, module, "A")])
        np.testing.assert_array_equal(whole_b, tensors[tensor_name(1, module, "B")])


async def test_ranks_that_do_not_divide_are_refused(client: StoreClient) -> None:
    version = await put(client, make_tensors(2, modules=MODULES))
    with pytest.raises(FailedPrecondition, match=r"out_features of q_proj is 48, which 5 ranks do not divide"):
        await client.fetch(version, tp_size=5)


async def test_too_many_ranks_are_refused(client: StoreClient) -> None:
    with pytest.raises(InvalidArgument, match="tp_size is 65; the limit is 64"):
        await client.fetch("0" * 64, tp_size=65)


async def test_a_form_is_made_once_and_goes_on_from_an_offset(client: StoreClient, shared_data_dir: Path) -> None:
    version = await put(client, make_tensors(3, modules=MODULES))
    form = shared_data_dir / "derived" / version / "float16.1of2" / "packed.float16"
    whole = await client.fetch(version, dtype=dtype_to_proto("float16"), tp_rank=1, tp_size=2)
    made = form.stat().st_ino
    rest = await client.fetch(version, dtype=dtype_to_proto("float16"), tp_rank=1, tp_size=2, offset_bytes=100)
    np.testing.assert_array_equal(rest.data, whole.data[100:])
    assert form.stat().st_ino == made


async def test_nothing_is_made_from_damaged_bytes(client: StoreClient, shared_data_dir: Path) -> None:
    version = await put(client, make_tensors(4, modules=MODULES))
    packed = shared_data_dir / "objects" / version / "packed.float32"
    packed.chmod(0o600)
    data = bytearray(packed.read_bytes())
    data[0] ^= 1
    packed.write_bytes(data)
    with pytest.raises(DataLoss):
        await client.fetch(version, dtype=dtype_to_proto("float16"))
