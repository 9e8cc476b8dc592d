"""What a Hugging Face config.json says about a decoder, as flags."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from common.base_model import BaseGeometry, geometry
from gpu_worker.models.families import family_of
from gpu_worker.models.rope import DynamicScaling, RopeConfig, YarnScaling
from gpu_worker.models.rope_config import read_rope


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Everything that distinguishes one supported decoder from another."""

    geometry: BaseGeometry
    rms_norm_eps: float
    rope: RopeConfig
    # q, k and v have biases
    qkv_bias: bool
    # o has one
    o_bias: bool
    # gate, up and down have biases
    mlp_bias: bool
    # each query and key head is normalised before rotation
    qk_norm: bool
    # tokens a layer's token sees, itself included; 0 = all before it
    sliding_windows: tuple[int, ...]
    # the output matrix is the embedding
    tied_embeddings: bool
    # what the checkpoint says its weights are; "float32" when it does not say
    checkpoint_dtype: str

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Reads config.json as transformers 4 and 5 write it.

        Raises ValueError that names the field for a family, rope kind, layer kind, activation or quantisation that is
        not supported, a missing field, and sizes that do not divide.
        """
        family = family_of(config)
        _refuse_unsupported(config)
        sizes = geometry(config)
        _check_sizes(sizes)
        rope = read_rope(config, sizes.max_context_tokens)
        attention_bias = family.reads_attention_bias and bool(config.get("attention_bias"))
        dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
        return cls(
            geometry=replace(sizes, max_context_tokens=_context_tokens(rope, sizes.max_context_tokens)),
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope=rope,
            qkv_bias=family.qkv_bias or attention_bias,
            o_bias=attention_bias,
            mlp_bias=family.reads_mlp_bias and bool(config.get("mlp_bias")),
            qk_norm=family.qk_norm,
            sliding_windows=family.windows(config, sizes.num_layers),
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            checkpoint_dtype=str(dtype).removeprefix("torch."),
        )


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ValueError(f"hidden_act {activation!r} is not supported; supported: silu")
    if config.get("quantization_config") is not None:
        raise ValueError("config.json has a quantization_config; quantised checkpoints are not supported")


def _check_sizes(sizes: BaseGeometry) -> None:
    if sizes.num_heads % sizes.num_kv_heads:
        raise ValueError(f"{sizes.num_heads} attention heads do not divide among {sizes.num_kv_heads} key-value heads")
    if sizes.head_dim % 2 or sizes.head_dim < 4:
        raise ValueError(f"head_dim is {sizes.head_dim}; rotary embedding needs an even number of at least 4")


def _context_tokens(rope: RopeConfig, max_position_embeddings: int) -> int:
    """Dynamic and YaRN checkpoints may name the length before scaling, which is then not what they can serve."""
    if isinstance(rope.scaling, DynamicScaling | YarnScaling):
        return max(max_position_embeddings, int(rope.scaling.factor * rope.scaling.original_max_positions))
    return max_position_embeddings
