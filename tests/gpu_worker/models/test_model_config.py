from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from gpu_worker.models.config import ModelConfig
from gpu_worker.models.rope import cos_sin_table
from tests.gpu_worker.models.checkpoints import LLAMA3_ROPE, TINY, VARIANTS

MINIMAL: dict[str, Any] = {"model_type": "llama"} | {
    name: TINY[name]
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
    )
}
LLAMA3_SCALING = {name: value for name, value in LLAMA3_ROPE.items() if name != "rope_theta"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_reads_what_transformers_5_writes(variant: str) -> None:
    theirs = LlamaConfig(**(TINY | VARIANTS[variant]), dtype="bfloat16")
    config = ModelConfig.from_hf(theirs.to_dict())
    assert config.geometry.num_kv_heads == theirs.num_key_value_heads
    assert config.geometry.head_dim == theirs.head_dim
    assert (config.attention_bias, config.mlp_bias) == (theirs.attention_bias, theirs.mlp_bias)
    assert config.tied_embeddings == theirs.tie_word_embeddings
    assert config.rms_norm_eps == theirs.rms_norm_eps
    assert config.rope.theta == theirs.rope_parameters["rope_theta"]
    assert (config.rope.llama3 is not None) == (variant == "llama3-rope")
    assert config.checkpoint_dtype == "bfloat16"


@pytest.mark.parametrize("kind_field", ["rope_type", "type"])
def test_transformers_4_and_5_mean_the_same(kind_field: str) -> None:
    old_scaling = {kind_field if name == "rope_type" else name: value for name, value in LLAMA3_SCALING.items()}
    old = MINIMAL | {"rope_theta": 500000.0, "rope_scaling": old_scaling, "torch_dtype": "float16"}
    new = MINIMAL | {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 500000.0}, "dtype": "float16"}
    assert ModelConfig.from_hf(old) == ModelConfig.from_hf(new)


def test_defaults_are_those_of_transformers() -> None:
    config, theirs = ModelConfig.from_hf(MINIMAL | {"rope_scaling": None}), LlamaConfig(**MINIMAL)
    assert config.geometry.num_kv_heads == theirs.num_key_value_heads == 6
    assert config.geometry.head_dim == theirs.head_dim == 8
    assert config.rms_norm_eps == theirs.rms_norm_eps
    assert config.rope.theta == theirs.rope_parameters["rope_theta"]
    assert not config.tied_embeddings
    assert config.checkpoint_dtype == "float32"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; supported: llama"),
        ({"model_type": None}, "model_type None is not supported; supported: llama"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; supported: silu"),
        ({"quantization_config": {"bits": 4}}, "quantised checkpoints are not supported"),
        ({"rope_scaling": {"type": "yarn"}}, "rope type 'yarn' is not supported; supported: default, llama3"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rope type 'dynamic' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope type 'llama3' has no 'low_freq_factor'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"num_key_value_heads": 4}, "6 attention heads do not divide among 4 key-value heads"),
        ({"head_dim": 7}, "head_dim is 7"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refuses_by_name(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ModelConfig.from_hf(MINIMAL | changes)


def test_names_a_missing_field() -> None:
    config = {name: value for name, value in MINIMAL.items() if name != "hidden_size"}
    with pytest.raises(ValueError, match="has no 'hidden_size'"):
        ModelConfig.from_hf(config)


@pytest.mark.parametrize("variant", ["gqa", "theta", "llama3-rope"])
def test_rope_table_equals_transformers_bit_for_bit(variant: str) -> None:
    theirs = LlamaConfig(**(TINY | VARIANTS[variant]))
    cos, sin = LlamaRotaryEmbedding(theirs)(torch.zeros(1), torch.arange(64)[None])
    config = ModelConfig.from_hf(theirs.to_dict())
    table = cos_sin_table(config.rope, config.geometry.head_dim, 64)
    half = config.geometry.head_dim // 2
    assert torch.equal(table[:, 0], cos[0, :, :half])
    assert torch.equal(table[:, 1], sin[0, :, :half])


def test_llama3_rope_leaves_short_keeps_long_and_mixes_between() -> None:
    """At position 1 the angle is the frequency itself, below pi here."""
    config = ModelConfig.from_hf(MINIMAL | {"head_dim": 32, "rope_parameters": LLAMA3_ROPE})
    plain = ModelConfig.from_hf(MINIMAL | {"head_dim": 32})
    cosines = (cos_sin_table(each.rope, 32, 2)[1, 0].double() for each in (config, plain))
    stretched, frequencies = (cosine.acos() for cosine in cosines)
    wavelength = 2 * torch.pi / frequencies
    assert torch.allclose(stretched[wavelength < 4], frequencies[wavelength < 4])
    between = (wavelength > 4.1) & (wavelength < 15.9)
    assert between.any()
    assert (stretched[between] < frequencies[between]).all()
    assert (stretched[between] > frequencies[between] / 8).all()
