"""What PEFT saves arrives at a worker bit for bit, and scaled as PEFT scales it."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from common.errors import InvalidArgument
from common.packing import unpack
from common.wire import layout_from_proto
from loraplex.v1 import types_pb2
from tests.adapter_store.fakes import Fetched, StoreClient
from tests.adapter_store.peft_adapters import PeftAdapter, make_adapter, make_base, rename_tensors, save_adapter

ELEMENTS = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: np.uint16}


pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    # PEFT asks this of transformers.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]


@pytest.fixture
def client(shared_client: StoreClient) -> StoreClient:
    return shared_client


@pytest.fixture(scope="module")
def base() -> Any:
    return make_base()


def bits(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """numpy has no bfloat16."""
    result: npt.NDArray[Any] = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return result


def group_of(module: str) -> str:
    return "self_attn" if module[0] in "qkvo" else "mlp"


def assert_same_tensors(fetched: Fetched, adapter: PeftAdapter, inner: str = "model.") -> None:
    """Every tensor of the adapter is in the packed string, and nothing else."""
    element = ELEMENTS[next(iter(adapter.tensors.values())).dtype]
    unpacked = unpack(layout_from_proto(fetched.layout), fetched.data, element)
    assert 2 * len(unpacked) == len(adapter.tensors)
    for (layer, module), parts in unpacked.items():
        for part, got in zip("AB", parts, strict=True):
            name = f"base_model.model.{inner}layers.{layer}.{group_of(module)}.{module}.lora_{part}.weight"
            np.testing.assert_array_equal(got, bits(adapter.tensors[name]))


def assert_same_scaling(fetched: Fetched, adapter: PeftAdapter, inner: str = "model.") -> None:
    modules = layout_from_proto(fetched.layout).modules
    got = {f"{inner}layers.{m.layer}.{group_of(m.module)}.{m.module}": m.scaling for m in modules}
    # The wire carries scaling as float32.
    assert got == {name: float(np.float32(scaling)) for name, scaling in adapter.scaling.items()}


PATTERNS = {"rank_pattern": {"k_proj": 1, "mlp.up_proj": 9, "^model.layers.1.self_attn.q_proj": 2}} | {
    "alpha_pattern": {"layers.0.self_attn.v_proj": 3, "v_proj": 40, "down_proj": 5}
}


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        pytest.param({"r": 8, "lora_alpha": 16}, torch.float32, id="float32"),
        pytest.param({"r": 8, "lora_alpha": 16}, torch.float16, id="float16"),
        pytest.param({"r": 8, "lora_alpha": 16}, torch.bfloat16, id="bfloat16"),
        pytest.param({"r": 1, "task_type": "CAUSAL_LM"}, torch.float32, id="rank-1"),
        pytest.param({"r": 128, "target_modules": ["o_proj"]}, torch.float32, id="rank-128"),
        pytest.param({"r": 24, "lora_alpha": 7, "use_rslora": True}, torch.float32, id="rslora"),
        pytest.param({"r": 4, **PATTERNS}, torch.float32, id="patterns"),
        pytest.param({"r": 4, "use_rslora": True, **PATTERNS}, torch.bfloat16, id="rslora-patterns"),
        pytest.param({"r": 3, "target_modules": ["q_proj", "up_proj"]}, torch.float32, id="two-modules"),
        pytest.param({"r": 3, "target_modules": "all-linear"}, torch.float32, id="all-linear"),
        pytest.param({"r": 3, "target_modules": r".*\.1\..*(q|v)_proj"}, torch.float32, id="target-regex"),
        pytest.param({"r": 3, "layers_to_transform": [1]}, torch.float32, id="one-layer"),
        pytest.param({"r": 3, "exclude_modules": ["k_proj", "gate_proj"]}, torch.float32, id="exclude"),
    ],
)
# PEFT warns of use_rslora beside patterns, although it does what it says.
@pytest.mark.filterwarnings("ignore:.*use_rslora.*")
async def test_an_adapter_of_peft_arrives_as_it_was(
    client: StoreClient, base: Any, tmp_path: Path, options: dict[str, Any], dtype: torch.dtype
) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", dtype=dtype, **options)
    response = await client.upload("a", adapter.files)
    fetched = await client.fetch(response.adapter.adapter_version)
    assert not response.warnings
    assert_same_tensors(fetched, adapter)
    assert_same_scaling(fetched, adapter)
    norm = math.sqrt(sum(effect.delta_norm**2 for effect in response.adapter.modules))
    # The store sums products of 16-bit values in float32, others in float64 as is done here.
    error = 1e-10 if dtype == torch.float32 else 1e-6
    assert norm == pytest.approx(math.sqrt(sum(norm**2 for norm in adapter.delta_norm.values())), rel=error)


async def test_names_with_default_are_the_same_adapter(client: StoreClient, base: Any, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", r=3)
    files = rename_tensors(tmp_path / "adapter", ".weight", ".default.weight")
    fetched = await client.fetch((await client.upload("a", files)).adapter.adapter_version)
    assert_same_tensors(fetched, adapter)


async def test_an_adapter_of_the_model_without_its_head_fits(client: StoreClient, base: Any, tmp_path: Path) -> None:
    adapter = make_adapter(base.model, tmp_path / "adapter", r=3, alpha_pattern={"^layers.0.self_attn.q_proj": 2})
    fetched = await client.fetch((await client.upload("a", adapter.files)).adapter.adapter_version)
    assert_same_tensors(fetched, adapter, inner="")
    assert_same_scaling(fetched, adapter, inner="")


async def test_the_ranks_of_a_pattern_are_told(client: StoreClient, base: Any, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", r=4, rank_pattern={"layers.1.self_attn.q_proj": 9})
    answer = (await client.upload("a", adapter.files)).adapter
    effect = next(effect for effect in answer.modules if effect.module == types_pb2.LORA_MODULE_Q_PROJ)
    assert (effect.num_layers, effect.min_lora_rank, effect.max_lora_rank, answer.max_lora_rank) == (2, 4, 9, 9)


async def test_what_peft_leaves_untrained_is_a_warning(client: StoreClient, base: Any, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", r=4, init_lora_weights=True)
    assert "all zero" in (await client.upload("a", adapter.files)).warnings[0]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        pytest.param({"use_dora": True}, "USE_DORA_UNSUPPORTED", id="dora"),
        pytest.param({"modules_to_save": ["lm_head"]}, "MODULES_TO_SAVE_UNSUPPORTED", id="modules-to-save"),
        pytest.param({"bias": "lora_only"}, "BIAS_UNSUPPORTED", id="bias-lora-only"),
        pytest.param({"bias": "all"}, "BIAS_UNSUPPORTED", id="bias-all"),
        pytest.param({"lora_bias": True}, "LORA_BIAS_UNSUPPORTED", id="lora-bias"),
        pytest.param({"trainable_token_indices": [1, 2]}, "TRAINABLE_TOKEN_INDICES_UNSUPPORTED", id="added-tokens"),
        pytest.param({"init_lora_weights": "pissa"}, "INIT_LORA_WEIGHTS_UNSUPPORTED", id="pissa"),
        pytest.param({"target_modules": ["q_proj", "lm_head"]}, "TARGET_MODULE_UNSUPPORTED", id="lm-head"),
        pytest.param({"target_modules": ["embed_tokens"]}, "TARGET_MODULE_UNSUPPORTED", id="embedding"),
    ],
)
# PEFT warns of the biases of lora_bias, which are what it asked for.
@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")
async def test_what_peft_saves_and_we_do_not_compute_is_refused_by_name(
    client: StoreClient, base: Any, tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
    files = save_adapter(base, tmp_path / "adapter", r=3, **options)
    with pytest.raises(InvalidArgument) as caught:
        await client.upload("a", files)
    assert caught.value.reason == reason


async def test_one_misspelt_tensor_is_an_error(client: StoreClient, base: Any, tmp_path: Path) -> None:
    make_adapter(base, tmp_path / "adapter", r=3)
    files = rename_tensors(tmp_path / "adapter", "layers.1.self_attn.q_proj.lora_A", "layers.1.self_attn.q_prj.lora_A")
    with pytest.raises(InvalidArgument, match=r"q_prj.* is unknown"):
        await client.upload("a", files)
