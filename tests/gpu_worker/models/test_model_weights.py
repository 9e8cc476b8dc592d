"""What a checkpoint folder can lack or hold too much, each named."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpu_worker.models import load_model
from kernels.linear import as_rows
from tests.gpu_worker.models.checkpoints import edit_config, random_model, save

Q_WEIGHT = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(random_model(), tmp_path)


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def test_fuses_and_casts(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    layer = load_model(folder, "bfloat16", "cpu").weights.layers[1]
    parts = [tensors[f"model.layers.1.self_attn.{name}_proj.weight"] for name in ("q", "k", "v")]
    assert torch.equal(as_rows(layer.qkv.weight), torch.cat(parts).bfloat16())
    assert layer.qkv.out_features == (48, 16, 16)
    parts = [tensors[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "up")]
    assert torch.equal(as_rows(layer.gate_up.weight), torch.cat(parts).bfloat16())
    assert layer.gate_up.out_features == (80, 80)
    assert layer.down.in_features == 80
    assert (layer.q_norm, layer.k_norm, layer.qkv.bias, layer.o.bias) == (None, None, None, None)


def test_norms_and_biases_of_queries_and_keys(tmp_path: Path) -> None:
    tensors = load_file(save(random_model("qwen3-biases-window"), tmp_path) / "model.safetensors")
    layer = load_model(tmp_path, "float32", "cpu").weights.layers[2]
    prefix = "model.layers.2.self_attn"
    assert layer.q_norm is not None
    assert layer.k_norm is not None
    assert layer.qkv.bias is not None
    assert torch.equal(layer.q_norm, tensors[f"{prefix}.q_norm.weight"])
    assert torch.equal(layer.k_norm, tensors[f"{prefix}.k_norm.weight"])
    assert torch.equal(layer.qkv.bias, torch.cat([tensors[f"{prefix}.{name}_proj.bias"] for name in "qkv"]))


@pytest.mark.parametrize(
    ("requested", "stored", "served"),
    [
        ("auto", "float32", torch.float32),
        ("auto", "bfloat16", torch.bfloat16),
        ("auto", "float16", torch.bfloat16),
        ("float32", "bfloat16", torch.float32),
        ("bfloat16", "float32", torch.bfloat16),
    ],
)
def test_serving_dtype(requested: str, stored: str, served: torch.dtype, tmp_path: Path) -> None:
    save(random_model().to(getattr(torch, stored)), tmp_path)
    decoder = load_model(tmp_path, requested, "cpu")
    assert decoder.dtype == served
    assert {decoder.weights.final_norm.dtype, decoder.weights.layers[0].qkv.weight.dtype} == {served}


@pytest.mark.parametrize("dtype", ["float16", "int8", ""])
def test_unknown_dtype(dtype: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=f"dtype '{dtype}' is not supported; supported: float32, bfloat16, auto"):
        load_model(folder, dtype, "cpu")


def test_missing_tensor(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop(Q_WEIGHT))
    with pytest.raises(ValueError, match=f"lacks 1 tensors of this model, first {Q_WEIGHT}"):
        load_model(folder, "float32", "cpu")


def test_missing_biases(folder: Path) -> None:
    edit_config(folder, mlp_bias=True)
    with pytest.raises(ValueError, match=r"lacks 9 tensors of this model, first model.layers.0.mlp.down_proj.bias"):
        load_model(folder, "float32", "cpu")


@pytest.mark.parametrize(
    ("variant", "name", "also"),
    [
        ("qwen3", "q_norm.weight", "k_norm.weight"),
        ("qwen2", "v_proj.bias", "q_proj.bias"),
        ("qwen3-biases-window", "o_proj.bias", "k_norm.weight"),
        ("mistral", "o_proj.weight", "v_proj.weight"),
    ],
)
def test_each_family_names_what_it_lacks(variant: str, name: str, also: str, tmp_path: Path) -> None:
    save(random_model(variant), tmp_path)
    names = [f"model.layers.1.self_attn.{name}", f"model.layers.2.self_attn.{also}"]
    edit_tensors(tmp_path, lambda tensors: [tensors.pop(name) for name in names])
    with pytest.raises(ValueError, match=f"lacks 2 tensors of this model, first {names[0]}"):
        load_model(tmp_path, "float32", "cpu")


@pytest.mark.parametrize(
    ("stored", "taken_for", "name"),
    [
        ("qwen3", "llama", "k_norm.weight"),
        ("qwen2", "mistral", "k_proj.bias"),
        ("llama-biases", "qwen2", "o_proj.bias"),
    ],
)
def test_a_checkpoint_of_another_family_is_refused(stored: str, taken_for: str, name: str, tmp_path: Path) -> None:
    save(random_model(stored), tmp_path)
    edit_config(tmp_path, model_type=taken_for, attention_bias=False, mlp_bias=False)
    pattern = rf"holds model\.layers\.\d\.(self_attn\.{name}|mlp\.\w+\.bias), which this model does not have"
    with pytest.raises(ValueError, match=pattern):
        load_model(tmp_path, "float32", "cpu")


def test_wrong_shape(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({Q_WEIGHT: torch.zeros(48, 47)}))
    with pytest.raises(ValueError, match=rf"{Q_WEIGHT} has shape \[48, 47\] where \[48, 48\] belongs"):
        load_model(folder, "float32", "cpu")


def test_wrong_element_type(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({Q_WEIGHT: torch.zeros(48, 48, dtype=torch.int8)}))
    with pytest.raises(ValueError, match=rf"{Q_WEIGHT} is torch.int8; supported: float32, bfloat16, float16"):
        load_model(folder, "float32", "cpu")


def test_unexpected_tensor(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"model.layers.1.self_attn.q_norm.weight": torch.ones(8)}))
    with pytest.raises(ValueError, match=r"holds model.layers.1.self_attn.q_norm.weight, which this model does not"):
        load_model(folder, "float32", "cpu")


def test_known_buffers_are_ignored(folder: Path) -> None:
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    edit_tensors(folder, lambda tensors: tensors.update(buffer))
    load_model(folder, "float32", "cpu")


def test_a_tied_output_matrix_may_be_stored_too(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=True)
    weights = load_model(folder, "float32", "cpu").weights
    assert weights.lm_head is weights.embedding


def test_missing_shard(tmp_path: Path) -> None:
    save(random_model(), tmp_path, max_shard_size="60KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=f"shard {shard.name} .* is missing"):
        load_model(tmp_path, "float32", "cpu")


def test_unreadable_file(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not a safetensors file at all")
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        load_model(folder, "float32", "cpu")


def test_unknown_family(folder: Path) -> None:
    edit_config(folder, model_type="mamba")
    with pytest.raises(ValueError, match="model_type 'mamba' is not supported; supported: llama"):
        load_model(folder, "float32", "cpu")
