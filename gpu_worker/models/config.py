"""What a Hugging Face config.json says about a decoder, as flags."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.base_model import BaseGeometry, geometry
from gpu_worker.models.rope import Llama3Scaling, RopeConfig

SUPPORTED_MODEL_TYPES = ("llama",)
SUPPORTED_ROPE_TYPES = ("default", "llama3")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Everything that distinguishes one supported decoder from another."""

    geometry: BaseGeometry
    rms_norm_eps: float
    rope: RopeConfig
    # q, k, v and o have biases
    attention_bias: bool
    # gate, up and down have biases
    mlp_bias: bool
    # the output matrix is the embedding
    tied_embeddings: bool
    # what the checkpoint says its weights are; "float32" when it does not say
    checkpoint_dtype: str

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Reads config.json as transformers 4 and 5 write it.

        Raises ValueError that names the field for a family, rope kind, activation or quantisation that is not
        supported, a missing field, and sizes that do not divide.
        """
        _refuse_unsupported(config)
        sizes = geometry(config)
        _check_sizes(sizes)
        dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
        return cls(
            geometry=sizes,
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope=_rope(config, sizes.max_context_tokens),
            attention_bias=bool(config.get("attention_bias", False)),
            mlp_bias=bool(config.get("mlp_bias", False)),
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            checkpoint_dtype=str(dtype).removeprefix("torch."),
        )


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    model_type = config.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise ValueError(f"model_type {model_type!r} is not supported; supported: {', '.join(SUPPORTED_MODEL_TYPES)}")
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ValueError(f"hidden_act {activation!r} is not supported; supported: silu")
    if config.get("quantization_config") is not None:
        raise ValueError("config.json has a quantization_config; quantised checkpoints are not supported")


def _check_sizes(sizes: BaseGeometry) -> None:
    if sizes.num_heads % sizes.num_kv_heads:
        raise ValueError(f"{sizes.num_heads} attention heads do not divide among {sizes.num_kv_heads} key-value heads")
    if sizes.head_dim % 2:
        raise ValueError(f"head_dim is {sizes.head_dim}; rotary embedding needs an even number")


def _rope(config: Mapping[str, Any], max_context_tokens: int) -> RopeConfig:
    """Reads rope_parameters (transformers 5), or rope_theta and rope_scaling (4); the older files write `type`."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in SUPPORTED_ROPE_TYPES:
        raise ValueError(f"rope type {kind!r} is not supported; supported: {', '.join(SUPPORTED_ROPE_TYPES)}")
    rotated = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if rotated != 1.0:
        raise ValueError(f"partial_rotary_factor {rotated} is not supported; supported: 1.0")
    theta = float(parameters.get("rope_theta", config.get("rope_theta", 10000.0)))
    if kind == "default":
        return RopeConfig(theta)
    try:
        scaling = Llama3Scaling(
            factor=float(parameters["factor"]),
            low_freq_factor=float(parameters["low_freq_factor"]),
            high_freq_factor=float(parameters["high_freq_factor"]),
            original_max_positions=int(parameters.get("original_max_position_embeddings", max_context_tokens)),
        )
    except KeyError as error:
        raise ValueError(f"config.json: rope type {kind!r} has no {error.args[0]!r}") from None
    return RopeConfig(theta, scaling)
