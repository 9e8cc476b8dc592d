"""Reading config.json: what transformers 4 and 5 write, the defaults, and what is refused."""

import re
from copy import deepcopy
from typing import Any

import pytest
from transformers import AutoConfig

from gpu_worker.models.config import ModelConfig
from gpu_worker.models.rope import YarnScaling
from tests.gpu_worker.models.checkpoints import FAMILIES, LLAMA3_ROPE, ROPE_KINDS, TINY, VARIANTS, YARN_ROPE

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
SLIDING, FULL = "sliding_attention", "full_attention"
OTHERS = {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8}


@pytest.mark.parametrize("variant", VARIANTS)
def test_reads_what_transformers_5_writes(variant: str) -> None:
    model_type, fields = VARIANTS[variant]
    theirs = AutoConfig.for_model(model_type, **deepcopy(TINY | fields), dtype="bfloat16")
    written = theirs.to_dict() | {"model_type": model_type.replace("ministral", "mistral")}
    config = ModelConfig.from_hf(written)
    assert config.geometry.num_kv_heads == theirs.num_key_value_heads
    assert config.geometry.head_dim == fields.get("head_dim", 8)
    assert config.qkv_bias == (model_type == "qwen2" or fields.get("attention_bias", False))
    assert config.o_bias == fields.get("attention_bias", False)
    assert config.mlp_bias == fields.get("mlp_bias", False)
    assert config.qk_norm == (model_type == "qwen3")
    assert config.tied_embeddings == theirs.tie_word_embeddings
    assert config.rms_norm_eps == theirs.rms_norm_eps
    assert config.rope.theta == theirs.rope_parameters["rope_theta"]
    assert config.checkpoint_dtype == "bfloat16"


@pytest.mark.parametrize("kind_field", ["rope_type", "type"])
@pytest.mark.parametrize("kind", ROPE_KINDS)
def test_transformers_4_and_5_mean_the_same(kind: str, kind_field: str) -> None:
    changes = ROPE_KINDS[kind] | {"dtype": "float16"}
    new = MINIMAL | changes
    parameters = changes.pop("rope_parameters", {"rope_type": "default"})
    scaling = {kind_field if name == "rope_type" else name: value for name, value in parameters.items()}
    scaling.pop("rope_theta", None)
    old = MINIMAL | changes | {"rope_theta": 10000.0, "rope_scaling": scaling, "torch_dtype": changes.pop("dtype")}
    del old["dtype"]
    assert ModelConfig.from_hf(old) == ModelConfig.from_hf(new)


def test_the_original_length_may_stand_at_the_top() -> None:
    """As transformers, which lets it win."""
    config = MINIMAL | {"rope_parameters": YARN_ROPE}
    top = ModelConfig.from_hf(config | {"original_max_position_embeddings": 24}).rope.scaling
    inside = ModelConfig.from_hf(config).rope.scaling
    assert isinstance(top, YarnScaling)
    assert isinstance(inside, YarnScaling)
    assert (top.original_max_positions, inside.original_max_positions) == (24, 16)


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_transformers(family: str) -> None:
    written = MINIMAL | {"model_type": family, "rope_scaling": None, "num_key_value_heads": 6, "head_dim": 8}
    config, theirs = ModelConfig.from_hf(written), AutoConfig.for_model(**written)
    assert config.rms_norm_eps == theirs.rms_norm_eps
    assert config.rope.theta == theirs.rope_parameters["rope_theta"]
    assert set(config.sliding_windows) == {getattr(theirs, "sliding_window", None) or 0}
    assert not config.tied_embeddings
    assert not config.o_bias
    assert config.checkpoint_dtype == "float32"


def test_llama_has_as_many_key_value_heads_as_heads_and_divides_the_hidden_size() -> None:
    config, theirs = ModelConfig.from_hf(MINIMAL), AutoConfig.for_model(**MINIMAL)
    assert config.geometry.num_kv_heads == theirs.num_key_value_heads == 6
    assert config.geometry.head_dim == theirs.head_dim == 8


@pytest.mark.parametrize(
    ("family", "fields", "windows"),
    [
        ("llama", {}, (0, 0, 0)),
        ("mistral", {}, (8, 8, 8)),
        ("mistral", {"sliding_window": None}, (0, 0, 0)),
        ("mistral", {"layer_types": [SLIDING, FULL, SLIDING]}, (8, 0, 8)),
        ("mistral", {"layer_types": None}, (8, 8, 8)),
        ("qwen2", {}, (0, 0, 0)),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 0, "max_window_layers": 0}, (0, 0, 0)),
        ("qwen2", {"use_sliding_window": True}, (0, 0, 0)),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}, (0, 0, 8)),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": None}, (0, 0, 0)),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 0}, (8, 8, 8)),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 0, "layer_types": [FULL] * 3}, (0, 0, 0)),
        ("qwen3", {"use_sliding_window": True, "layer_types": [FULL, SLIDING, FULL]}, (0, 8, 0)),
    ],
)
def test_sliding_windows(family: str, fields: dict[str, Any], windows: tuple[int, ...]) -> None:
    assert ModelConfig.from_hf(MINIMAL | OTHERS | {"model_type": family} | fields).sliding_windows == windows


SERVED = "supported: llama (Llama 2, 3), mistral (Mistral), qwen2 (Qwen2, Qwen2.5), qwen3 (Qwen3)"
ROPES = "supported: default, linear, dynamic, llama3, yarn"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "gpt2"}, f"model_type 'gpt2' is not supported; {SERVED}"),
        ({"model_type": None}, f"model_type None is not supported; {SERVED}"),
        (
            {"model_type": "phi3"},
            f"model_type 'phi3' (fused projections and partial rotation) is not supported; {SERVED}",
        ),
        (
            {"model_type": "gemma2"},
            f"model_type 'gemma2' (other norms, activation and scaling) is not supported; {SERVED}",
        ),
        (
            {"model_type": "gemma3_text"},
            "model_type 'gemma3_text' (other norms, activation and scaling) is not supported",
        ),
        ({"model_type": "mixtral"}, f"model_type 'mixtral' (a mixture of experts) is not supported; {SERVED}"),
        ({"model_type": "qwen2_moe"}, "model_type 'qwen2_moe' (a mixture of experts) is not supported"),
        ({"model_type": "qwen3_moe"}, "model_type 'qwen3_moe' (a mixture of experts) is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; supported: silu"),
        ({"quantization_config": {"bits": 4}}, "quantised checkpoints are not supported"),
        ({"num_key_value_heads": 4}, "6 attention heads do not divide among 4 key-value heads"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"head_dim": 2}, "head_dim is 2"),
    ],
)
def test_refuses_by_name(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        ModelConfig.from_hf(MINIMAL | changes)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rope_scaling": {"type": "longrope"}}, f"rope type 'longrope' is not supported; {ROPES}"),
        ({"rope_parameters": {"rope_type": "mrope"}}, f"rope type 'mrope' is not supported; {ROPES}"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope type 'linear' has no 'factor'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": None}}, "rope type 'dynamic' has no 'factor'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope type 'yarn' has no 'factor'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope type 'llama3' has no 'low_freq_factor'"),
        ({"rope_scaling": LLAMA3_SCALING | {"high_freq_factor": 1.0}}, "high_freq_factor is 1.0; a number above low"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0; a number above 0 is needed"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor is '2'; a number above 0 is needed"),
        ({"rope_scaling": {"type": "linear", "factor": float("nan")}}, "factor is nan; a number above 0 is needed"),
        ({"rope_theta": True}, "rope_theta is True; a number above 0 is needed"),
        ({"rope_theta": 1.0}, "rope_theta is 1.0; a number above 1 is needed"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported; supported: 1.0"),
        ({"rope_parameters": {FULL: {"rope_type": "default"}}}, "must be one object of numbers for all layers"),
        ({"rope_scaling": "yarn"}, "must be one object of numbers for all layers"),
    ],
)
def test_refuses_rope_by_name(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        ModelConfig.from_hf(MINIMAL | changes)


@pytest.mark.parametrize(
    ("family", "changes", "sentence"),
    [
        ("mistral", {"sliding_window": 0}, "sliding_window is 0; a whole number of at least 1 is needed"),
        ("mistral", {"sliding_window": 8.5}, "sliding_window is 8.5; a whole number"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": None}, "max_window_layers is None; a whole number"),
        ("qwen2", {"layer_types": [FULL, SLIDING, FULL]}, "'sliding_attention', but the model has no sliding_window"),
        ("qwen3", {"layer_types": [FULL, FULL]}, "must name the kind of each of the 3 layers"),
        ("qwen3", {"layer_types": [FULL, "linear_attention", FULL]}, "layer type 'linear_attention' is not supported"),
    ],
)
def test_refuses_windows_by_name(family: str, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        ModelConfig.from_hf(MINIMAL | OTHERS | {"model_type": family} | changes)


@pytest.mark.parametrize(
    ("family", "field"),
    [
        ("llama", "hidden_size"),
        ("mistral", "num_key_value_heads"),
        ("qwen2", "num_key_value_heads"),
        ("qwen3", "num_key_value_heads"),
        ("qwen3", "head_dim"),
    ],
)
def test_names_a_missing_field(family: str, field: str) -> None:
    config = MINIMAL | OTHERS | {"model_type": family}
    del config[field]
    with pytest.raises(ValueError, match=f"has no '{field}'"):
        ModelConfig.from_hf(config)
