"""Checkpoint and adapters in llama.cpp's format, float32."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
Array = npt.NDArray[np.float32]


def write_base(folder: Path, path: Path) -> dict[str, Any]:
    """Converts a checkpoint folder unless that was done; returns its config."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    if path.exists():
        return config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_file_type(0)
    writer.add_tokenizer_model("none")
    for name, array in load_file(folder / "model.safetensors").items():
        writer.add_tensor(*_base_tensor(name, array, config))
    _finish(writer)
    return config


def write_adapter(folder: Path, path: Path, config: dict[str, Any]) -> None:
    """Converts a folder that PEFT saved unless that was done."""
    if path.exists():
        return
    lora = json.loads((folder / "adapter_config.json").read_text())
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(lora["lora_alpha"]))
    for name, array in load_file(folder / "adapter_model.safetensors").items():
        # base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight
        layer, block, projection, side = name.split(".")[4:8]
        module = f"{block}.{projection}"
        if side == "lora_B":
            array = _rotated(module, array, config)
        writer.add_tensor(f"blk.{layer}.{NAMES[module]}.weight.{side.lower()}", np.ascontiguousarray(array))
    _finish(writer)


def _base_tensor(name: str, array: Array, config: dict[str, Any]) -> tuple[str, Array]:
    stem = name.removesuffix(".weight")
    if stem in TOP:
        return f"{TOP[stem]}.weight", array
    layer, module = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{NAMES[module]}.weight", np.ascontiguousarray(_rotated(module, array, config))


def _rotated(module: str, rows: Array, config: dict[str, Any]) -> Array:
    """llama.cpp turns neighbouring rows of a head, transformers the halves of it."""
    heads = {"self_attn.q_proj": "num_attention_heads", "self_attn.k_proj": "num_key_value_heads"}.get(module)
    if heads is None:
        return rows
    return rows.reshape(config[heads], 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
