"""Adapters made and saved by PEFT itself, and what PEFT computes with them."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

from adapter_store.blobs import CONFIG, WEIGHTS
from tests.adapter_store import tiny_base

ALL_MODULES = list(tiny_base.SHAPES)


@dataclass(frozen=True)
class PeftAdapter:
    """Files as saved; tensors by name as PEFT's; scaling and norm of the delta by module name inside the base."""

    files: Mapping[str, bytes]
    tensors: dict[str, torch.Tensor]
    scaling: dict[str, float]
    delta_norm: dict[str, float]


def make_base() -> Any:
    torch.manual_seed(0)
    settings = {name: value for name, value in tiny_base.CONFIG.items() if name != "model_type"}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))


def make_adapter(base: Any, folder: Path, *, dtype: torch.dtype = torch.float32, **options: Any) -> PeftAdapter:
    """Draws an adapter for a copy of `base` with all of its tensors non-zero, and saves it to `folder`."""
    torch.manual_seed(1)
    settings = {"init_lora_weights": False, "target_modules": ALL_MODULES} | options
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings)).to(dtype)
    model.peft_config["default"].base_model_name_or_path = tiny_base.NAME
    # Otherwise PEFT asks a hub for the base model's vocabulary.
    model.save_pretrained(folder, save_embedding_layers=False)
    layers = {name: layer for name, layer in model.base_model.model.named_modules() if hasattr(layer, "lora_A")}
    return PeftAdapter(
        files=read_files(folder),
        tensors=load_file(folder / WEIGHTS),
        scaling={name: layer.scaling["default"] for name, layer in layers.items()},
        delta_norm={name: delta_norm(layer) for name, layer in layers.items()},
    )


def save_adapter(base: Any, folder: Path, **options: Any) -> dict[str, bytes]:
    """The files of an adapter of any kind that PEFT makes."""
    settings = {"init_lora_weights": False, "target_modules": ALL_MODULES} | options
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings))
    model.save_pretrained(folder, save_embedding_layers=False)
    return read_files(folder)


def delta_norm(layer: Any) -> float:
    a, b = (part["default"].weight.detach().double() for part in (layer.lora_A, layer.lora_B))
    return float((layer.scaling["default"] * b @ a).norm())


def read_files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}


def rename_tensors(folder: Path, old: str, new: str) -> dict[str, bytes]:
    """Saves the adapter again with other names."""
    tensors = load_file(folder / WEIGHTS)
    save_file({name.replace(old, new): tensor for name, tensor in tensors.items()}, folder / WEIGHTS)
    return read_files(folder)
