from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from adapter_store.blobs import CHAT_TEMPLATE
from adapter_store.service import StoreService
from common.errors import AlreadyExists
from loraplex.v1 import types_pb2
from tests.adapter_store.crafted import make_files, make_tensors, tensor_name
from tests.adapter_store.fakes import StoreClient
from tests.adapter_store.tiny_base import NAME, SHAPES

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture
def client(shared_client: StoreClient) -> StoreClient:
    return shared_client


@pytest.fixture
def service(shared_service: StoreService) -> StoreService:
    return shared_service


def uploads(registry: CollectorRegistry, result: str, reason: str = "") -> float:
    return registry.get_sample_value("loraplex_store_uploads_total", {"result": result, "reason": reason}) or 0.0


async def test_the_answer_says_what_the_adapter_is(client: StoreClient) -> None:
    adapter = (await client.upload("a", make_files())).adapter
    in_features, out_features = SHAPES["q_proj"]
    assert (adapter.tenant, adapter.adapter_id, adapter.base_model) == (client.tenant, "a", NAME)
    assert (adapter.dtype, adapter.max_lora_rank, adapter.created_at_seconds) == (types_pb2.DTYPE_FLOAT32, 3, 1e6)
    assert len(adapter.adapter_version) == 64
    assert [effect.module for effect in adapter.modules] == [
        types_pb2.LORA_MODULE_Q_PROJ,
        types_pb2.LORA_MODULE_DOWN_PROJ,
    ]
    effect = adapter.modules[0]
    assert (effect.num_layers, effect.min_lora_rank, effect.max_lora_rank) == (1, 3, 3)
    assert effect.parameter_bytes == 3 * (in_features + out_features) * 4


async def test_the_norm_of_the_delta_is_that_of_scaling_b_a(client: StoreClient) -> None:
    tensors = make_tensors()
    adapter = (await client.upload("a", make_files(tensors=tensors))).adapter
    a, b = (tensors[tensor_name(1, "q_proj", part)].astype(np.float64) for part in "AB")
    # float64 sums of some thousand terms, in two orders.
    assert adapter.modules[0].delta_norm == pytest.approx(np.linalg.norm(2.0 * b @ a), rel=1e-12)


async def test_the_same_bytes_again_change_nothing(client: StoreClient, service: StoreService) -> None:
    before = uploads(service.server.registry, "duplicate")
    first = await client.upload("a", make_files())
    second = await client.upload("a", make_files())
    assert (first.created, second.created) == (True, False)
    assert second.adapter == first.adapter
    assert uploads(service.server.registry, "duplicate") == before + 1


async def test_the_version_does_not_depend_on_the_spelling_of_the_config(client: StoreClient) -> None:
    first = await client.upload("a", make_files())
    second = await client.upload("a", make_files(lora_alpha=6.0, lora_dropout=0.1, peft_version="0.21.2"))
    assert second.adapter.adapter_version == first.adapter.adapter_version


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"lora_alpha": 7}, id="alpha"),
        pytest.param({"use_rslora": True}, id="rslora"),
        pytest.param({"alpha_pattern": {"q_proj": 1}}, id="alpha-pattern"),
    ],
)
async def test_the_version_depends_on_every_setting_that_matters(client: StoreClient, changes: dict[str, Any]) -> None:
    first = await client.upload("a", make_files())
    second = await client.upload("b", make_files(**changes))
    assert second.adapter.adapter_version != first.adapter.adapter_version


async def test_the_order_of_patterns_is_part_of_the_version(client: StoreClient) -> None:
    patterns = {"q_proj": 1, "self_attn.q_proj": 2}
    backwards = dict(reversed(patterns.items()))
    first = await client.upload("a", make_files(alpha_pattern=patterns))
    second = await client.upload("b", make_files(alpha_pattern=backwards))
    assert second.adapter.adapter_version != first.adapter.adapter_version


async def test_a_chat_template_is_kept_and_part_of_the_version(client: StoreClient) -> None:
    plain = await client.upload("a", make_files())
    templated = await client.upload("b", make_files() | {CHAT_TEMPLATE: "{{ messages }} ä".encode()})
    assert templated.adapter.chat_template == "{{ messages }} ä"
    assert templated.adapter.adapter_version != plain.adapter.adapter_version


async def test_an_all_zero_delta_is_a_warning(client: StoreClient) -> None:
    tensors = {name: np.zeros_like(tensor) if "lora_B" in name else tensor for name, tensor in make_tensors().items()}
    response = await client.upload("a", make_files(tensors=tensors))
    assert list(response.warnings) == ["the adapter changes nothing: its delta is all zero"]
    assert [effect.delta_norm for effect in response.adapter.modules] == [0.0, 0.0]


@pytest.mark.parametrize("recorded", [NAME, f"some-org/{NAME}", f"models/{NAME}/", None, ""])
async def test_a_base_model_of_the_same_name_is_no_warning(client: StoreClient, recorded: str | None) -> None:
    assert not (await client.upload("a", make_files(base_model_name_or_path=recorded))).warnings


async def test_a_base_model_of_another_name_is_a_warning(client: StoreClient) -> None:
    response = await client.upload("a", make_files(base_model_name_or_path="org/other"))
    assert list(response.warnings) == [f"the adapter was made for 'org/other'; the base model here is '{NAME}'"]


@pytest.mark.parametrize("adapter_id", ["a", "0", "sql-coder.v2_x", "a" * 64])
async def test_a_plain_id_is_taken(client: StoreClient, adapter_id: str) -> None:
    assert (await client.upload(adapter_id, make_files())).adapter.adapter_id == adapter_id


async def test_an_id_in_use_is_not_overwritten(client: StoreClient, service: StoreService) -> None:
    first = await client.upload("a", make_files(0))
    with pytest.raises(AlreadyExists, match=first.adapter.adapter_version):
        await client.upload("a", make_files(1))
    assert await client.get("a") == first.adapter
    assert uploads(service.server.registry, "rejected", "ADAPTER_ALREADY_EXISTS") == 1


async def test_replace_moves_an_id(client: StoreClient) -> None:
    first = await client.upload("a", make_files(0))
    second = await client.upload("a", make_files(1), replace=True)
    assert second.created
    assert (await client.get("a")).adapter_version == second.adapter.adapter_version
    assert second.adapter.sequence > first.adapter.sequence
