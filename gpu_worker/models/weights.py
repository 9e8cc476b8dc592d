"""The weights of a decoder, fused as the forward pass wants them and read from safetensors."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.base_model import weight_files
from gpu_worker.models.config import ModelConfig
from kernels.linear import Weight, prepare

# Old checkpoints carry this table of frequencies; it follows from the config.
KNOWN_BUFFERS = ("rotary_emb.inv_freq",)
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Projection:
    """Linear layers that share an input. weight: `[sum(out_features), in_features]`, bias: `[sum(out_features)]`."""

    weight: Weight
    bias: Tensor | None
    in_features: int
    out_features: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer; the norms are `[hidden]`, those of queries and keys `[head_dim]` or absent."""

    input_norm: Tensor
    qkv: Projection
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Projection
    post_attention_norm: Tensor
    gate_up: Projection
    down: Projection


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """All weights of a decoder, in the serving dtype on one device; the embedding is `[vocab, hidden]`."""

    embedding: Weight
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor
    # [vocab, hidden]; the embedding itself when tied
    lm_head: Weight


def load_weights(
    model_dir: Path, config: ModelConfig, dtype: torch.dtype, device: str | torch.device
) -> DecoderWeights:
    """Reads all safetensors files of a checkpoint, casting to `dtype`.

    Raises ValueError naming the tensor (and the file) when one is missing, has another shape, is not a float32,
    bfloat16 or float16 tensor, or belongs to nothing this decoder has; naming the file when it is missing or damaged.
    """
    files = weight_files(model_dir)
    allocator = _Allocator(dtype, device)
    weights = _allocate(config, allocator)
    missing = set(allocator.destinations)
    for path in files:
        try:
            for name, tensor in _read(path, allocator.destinations, config.tied_embeddings):
                allocator.destinations[name].copy_(tensor)
                missing.discard(name)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
    if missing:
        raise ValueError(f"{model_dir} lacks {len(missing)} tensors of this model, first {min(missing)}")
    return _prepare(weights)


def _prepare(weights: DecoderWeights) -> DecoderWeights:
    """The matrices in the form that the products read fastest, in the same memory: `weights` is spent."""
    lm_head = prepare(weights.lm_head)
    tied = weights.lm_head is weights.embedding
    layers = tuple(_prepare_layer(layer) for layer in weights.layers)
    return replace(weights, embedding=lm_head if tied else weights.embedding, layers=layers, lm_head=lm_head)


def _prepare_layer(layer: LayerWeights) -> LayerWeights:
    qkv, o, gate_up, down = (
        replace(projection, weight=prepare(projection.weight))
        for projection in (layer.qkv, layer.o, layer.gate_up, layer.down)
    )
    return replace(layer, qkv=qkv, o=o, gate_up=gate_up, down=down)


def _read(path: Path, destinations: Mapping[str, Tensor], tied: bool) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, framework="pt", device="cpu") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            if name.endswith(KNOWN_BUFFERS) or (tied and name == "lm_head.weight"):
                continue
            destination = destinations.get(name)
            if destination is None:
                raise ValueError(f"{path.name} holds {name}, which this model does not have")
            tensor = file.get_tensor(name)
            if tensor.shape != destination.shape:
                expected = list(destination.shape)
                raise ValueError(f"{path.name}: {name} has shape {list(tensor.shape)} where {expected} belongs")
            if tensor.dtype not in WEIGHT_DTYPES:
                raise ValueError(f"{path.name}: {name} is {tensor.dtype}; supported: float32, bfloat16, float16")
            yield name, tensor


class _Allocator:
    """Makes tensors to be filled and remembers which part of which belongs to which name of the checkpoint."""

    def __init__(self, dtype: torch.dtype, device: str | torch.device) -> None:
        self.dtype = dtype
        self.device = device
        self.destinations: dict[str, Tensor] = {}

    def fused(self, names: tuple[str, ...], rows: tuple[int, ...], tail: tuple[int, ...] = ()) -> Tensor:
        """`[sum(rows), *tail]`, the named tensors one below the other."""
        tensor = torch.empty(sum(rows), *tail, dtype=self.dtype, device=self.device)
        self.destinations |= zip(names, tensor.split_with_sizes(rows), strict=True)
        return tensor

    def projection(self, names: tuple[str, ...], shapes: tuple[tuple[int, int], ...], has_bias: bool) -> Projection:
        """`shapes`: (in_features, out_features) of each; the inputs are the same."""
        in_features, out_features = shapes[0][0], tuple(out for _, out in shapes)
        weight = self.fused(tuple(f"{name}.weight" for name in names), out_features, (in_features,))
        bias = self.fused(tuple(f"{name}.bias" for name in names), out_features) if has_bias else None
        return Projection(weight, bias, in_features, out_features)


def _allocate(config: ModelConfig, allocator: _Allocator) -> DecoderWeights:
    sizes = config.geometry
    table = (sizes.vocab_size,), (sizes.hidden_size,)
    embedding = allocator.fused(("model.embed_tokens.weight",), *table)
    return DecoderWeights(
        embedding=embedding,
        layers=tuple(_allocate_layer(config, allocator, f"model.layers.{index}") for index in range(sizes.num_layers)),
        final_norm=allocator.fused(("model.norm.weight",), (sizes.hidden_size,)),
        lm_head=embedding if config.tied_embeddings else allocator.fused(("lm_head.weight",), *table),
    )


def _allocate_layer(config: ModelConfig, allocator: _Allocator, prefix: str) -> LayerWeights:
    shapes = config.geometry.module_shapes
    hidden, head_dim = (config.geometry.hidden_size,), (config.geometry.head_dim,)

    def norm(name: str, size: tuple[int]) -> Tensor:
        return allocator.fused((f"{prefix}.{name}.weight",), size)

    def projection(block: str, modules: tuple[str, ...], has_bias: bool) -> Projection:
        names = tuple(f"{prefix}.{block}.{module}" for module in modules)
        return allocator.projection(names, tuple(shapes[module] for module in modules), has_bias)

    return LayerWeights(
        input_norm=norm("input_layernorm", hidden),
        qkv=projection("self_attn", ("q_proj", "k_proj", "v_proj"), config.qkv_bias),
        q_norm=norm("self_attn.q_norm", head_dim) if config.qk_norm else None,
        k_norm=norm("self_attn.k_norm", head_dim) if config.qk_norm else None,
        o=projection("self_attn", ("o_proj",), config.o_bias),
        post_attention_norm=norm("post_attention_layernorm", hidden),
        gate_up=projection("mlp", ("gate_proj", "up_proj"), config.mlp_bias),
        down=projection("mlp", ("down_proj",), config.mlp_bias),
    )
