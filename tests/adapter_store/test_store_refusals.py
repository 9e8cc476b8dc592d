"""What is refused leaves nothing behind, so these tests share one store."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from adapter_store.blobs import CHAT_TEMPLATE
from adapter_store.service import StoreService
from common.errors import FailedPrecondition, InvalidArgument
from loraplex.v1 import adapter_store_pb2 as pb
from tests.adapter_store.crafted import Tensors, make_files, make_tensors, tensor_name
from tests.adapter_store.fakes import MIB, TENANT, StoreClient

pytestmark = pytest.mark.asyncio(loop_scope="module")

A, B = tensor_name(1, "q_proj", "A"), tensor_name(1, "q_proj", "B")
HEADER = pb.UploadAdapterRequest(header=pb.UploadHeader(tenant=TENANT, adapter_id="a"))


def chunk(file: int, data: bytes = b"{}") -> pb.UploadAdapterRequest:
    return pb.UploadAdapterRequest(chunk=pb.UploadChunk(file=pb.AdapterFile.ValueType(file), data=data))


def rejected(registry: CollectorRegistry, reason: str) -> float:
    labels = {"result": "rejected", "reason": reason}
    return registry.get_sample_value("loraplex_store_uploads_total", labels) or 0.0


@pytest.fixture
def service(shared_service: StoreService) -> StoreService:
    return shared_service


@pytest.fixture
def client(shared_client: StoreClient) -> StoreClient:
    return shared_client


@pytest.fixture(autouse=True, scope="module")
def nothing_is_left(shared_service: StoreService, shared_data_dir: Path) -> Iterator[None]:
    yield
    assert list((shared_data_dir / "staging").iterdir()) == []
    assert list((shared_data_dir / "objects").iterdir()) == []


@pytest.mark.parametrize(
    "adapter_id",
    [
        "",
        ".",
        "..",
        "../x",
        "..%2f",
        "/etc/passwd",
        "a/../../b",
        "a\0b",
        "\\\\host\\share",
        "a\N{FRACTION SLASH}b",
        "A",
        "-a",
        "a" * 65,
        pytest.param("a" * 4096, id="4096-letters"),
        "a\n",
    ],
    ids=repr,
)
async def test_an_id_that_could_be_a_path_is_refused(client: StoreClient, adapter_id: str) -> None:
    with pytest.raises(InvalidArgument, match="at most 64 characters") as caught:
        await client.upload(adapter_id, make_files())
    assert caught.value.reason == "ADAPTER_ID_INVALID"


@pytest.mark.parametrize(
    ("requests", "reason"),
    [
        pytest.param([], "HEADER_MISSING", id="nothing"),
        pytest.param([chunk(pb.ADAPTER_FILE_CONFIG)], "HEADER_MISSING", id="no-header"),
        pytest.param([HEADER, HEADER], "CHUNK_MISSING", id="two-headers"),
        pytest.param([HEADER, pb.UploadAdapterRequest()], "CHUNK_MISSING", id="empty-message"),
        pytest.param([HEADER, chunk(pb.ADAPTER_FILE_UNSPECIFIED)], "FILE_UNKNOWN", id="no-file"),
        pytest.param([HEADER, chunk(77)], "FILE_UNKNOWN", id="unknown-file"),
        pytest.param([HEADER, chunk(pb.ADAPTER_FILE_WEIGHTS, bytes(MIB + 1))], "CHUNK_TOO_LARGE", id="large-chunk"),
        pytest.param([HEADER, chunk(pb.ADAPTER_FILE_CONFIG, bytes(65537))], "FILE_TOO_LARGE", id="large-config"),
        pytest.param([HEADER, chunk(pb.ADAPTER_FILE_CHAT_TEMPLATE, bytes(65537))], "FILE_TOO_LARGE", id="template"),
        pytest.param(
            [HEADER, *map(chunk, (pb.ADAPTER_FILE_CONFIG, pb.ADAPTER_FILE_WEIGHTS, pb.ADAPTER_FILE_CONFIG))],
            "FILES_INTERLEAVED",
            id="interleaved",
        ),
        pytest.param([HEADER, chunk(pb.ADAPTER_FILE_CONFIG)], "FILE_MISSING", id="no-weights"),
        pytest.param([HEADER, chunk(pb.ADAPTER_FILE_WEIGHTS)], "FILE_MISSING", id="no-config"),
    ],
)
async def test_a_malformed_stream_is_refused_and_counted(
    client: StoreClient, service: StoreService, requests: list[pb.UploadAdapterRequest], reason: str
) -> None:
    before = rejected(service.server.registry, reason)
    with pytest.raises(InvalidArgument) as caught:
        await client.upload_requests(requests)
    assert caught.value.reason == reason
    assert rejected(service.server.registry, reason) == before + 1


async def test_expected_version_and_replace_contradict_each_other(client: StoreClient) -> None:
    with pytest.raises(InvalidArgument, match="give one"):
        await client.upload("a", make_files(), expected_version="0" * 64, replace=True)


@pytest.mark.parametrize("tenant", ["", "a\nb", "t" * 129], ids=["empty", "newline", "long"])
async def test_a_tenant_must_be_named(client: StoreClient, tenant: str) -> None:
    with pytest.raises(InvalidArgument, match="tenant must be 1 to 128 printable characters"):
        await client.upload("a", make_files(), tenant=tenant)


async def test_a_config_that_lies_about_the_rank_is_refused(client: StoreClient) -> None:
    with pytest.raises(InvalidArgument, match=r"has rank 3; the config gives .* the rank 4") as caught:
        await client.upload("a", make_files(r=4))
    assert caught.value.reason == "RANK_MISMATCH"


async def test_a_chat_template_that_is_not_text_is_refused(client: StoreClient) -> None:
    with pytest.raises(InvalidArgument, match=r"chat_template.jinja is not valid UTF-8"):
        await client.upload("a", make_files() | {CHAT_TEMPLATE: b"\xff"})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
async def test_weights_that_are_not_finite_are_refused(client: StoreClient, dtype: str, value: float) -> None:
    tensors = make_tensors(modules=("q_proj",))
    tensors[B][47, 2] = value
    if dtype == "bfloat16":
        tensors = {name: (tensor.view(np.uint32) >> 16).astype(np.uint16) for name, tensor in tensors.items()}
    else:
        tensors = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    with pytest.raises(InvalidArgument, match=r"the tensor '.*lora_B.*' holds NaN or infinity"):
        await client.upload("a", make_files(tensors=tensors))


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        pytest.param(
            {name.replace("layers.1.", "layers.2."): tensor for name, tensor in make_tensors().items()},
            "layer 2; the base model has 2 layers",
            id="layer",
        ),
        pytest.param(
            {A: np.ones((3, 64), np.float32), B: np.ones((48, 3), np.float32)}, "64 to 48.*48 to 48", id="in-features"
        ),
        pytest.param(
            {A: np.ones((3, 48), np.float32), B: np.ones((24, 3), np.float32)}, "48 to 24.*48 to 48", id="out-features"
        ),
    ],
)
async def test_an_adapter_of_another_base_is_refused(client: StoreClient, tensors: Tensors, problem: str) -> None:
    with pytest.raises(FailedPrecondition, match=problem) as caught:
        await client.upload("a", make_files(tensors=tensors))
    assert caught.value.reason == "BASE_MODEL_MISMATCH"
