"""Adapters written byte by byte, so that a test can spoil exactly one thing."""

import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from adapter_store.blobs import CONFIG, WEIGHTS
from tests.adapter_store.tiny_base import NAME, SHAPES

Tensors = dict[str, npt.NDArray[Any]]
DTYPES = {"float32": "F32", "float16": "F16", "uint16": "BF16"}


def tensor_name(layer: int, module: str, part: str) -> str:
    group = "self_attn" if module in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
    return f"base_model.model.model.layers.{layer}.{group}.{module}.lora_{part}.weight"


def make_tensors(seed: int = 0, *, lora_rank: int = 3, modules: tuple[str, ...] = ("q_proj", "down_proj")) -> Tensors:
    """A and B, float32, of some modules of layer 1."""
    random, tensors = np.random.default_rng(seed), {}
    for module in modules:
        in_features, out_features = SHAPES[module]
        tensors[tensor_name(1, module, "A")] = random.normal(size=(lora_rank, in_features)).astype(np.float32)
        tensors[tensor_name(1, module, "B")] = random.normal(size=(out_features, lora_rank)).astype(np.float32)
    return tensors


def make_header(tensors: Mapping[str, npt.NDArray[Any]]) -> dict[str, Any]:
    header, offset = {}, 0
    for name, tensor in tensors.items():
        dtype, shape = DTYPES[tensor.dtype.name], list(tensor.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    return header


def with_header(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def make_weights(tensors: Tensors, header: Mapping[str, Any] | None = None) -> bytes:
    """A safetensors file; `header` replaces the true one."""
    data = b"".join(tensor.tobytes() for tensor in tensors.values())
    return with_header(json.dumps(make_header(tensors) if header is None else header).encode(), data)


def make_config(**changes: Any) -> dict[str, Any]:
    """adapter_config.json of `make_tensors`, with changes."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": NAME,
        "r": 3,
        "lora_alpha": 6,
        "bias": "none",
        "target_modules": ["q_proj", "down_proj"],
    }
    return config | changes


def make_files(seed: int = 0, *, tensors: Tensors | None = None, **changes: Any) -> dict[str, bytes]:
    """The files of one adapter; another seed gives another version."""
    weights = make_weights(make_tensors(seed) if tensors is None else tensors)
    return {CONFIG: json.dumps(make_config(**changes)).encode(), WEIGHTS: weights}
