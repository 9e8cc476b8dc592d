"""A tiny random checkpoint of every family and rope kind, and adapters with every option."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from tests.e2e.tiny_model import ATTENTION, MLP, VOCAB_SIZE, load_oracle, save_tokenizer

# Outputs of 64 tokens cross both.
ORIGINAL, WINDOW = 64, 24
ROPE = {"rope_theta": 10000.0, "factor": 4.0}

TINY: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": ORIGINAL}
YARN = {"original_max_position_embeddings": ORIGINAL, "beta_fast": 2.0, "beta_slow": 0.2}

# kind -> (model_type, seed, changes of TINY). The seeds keep every continuation more than MIN_MARGIN from a tie.
KINDS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "llama-default": ("llama", 0, {}),
    "llama-linear": ("llama", 0, {"rope_parameters": {"rope_type": "linear", **ROPE}}),
    "llama-dynamic": (
        "llama",
        0,
        {"rope_parameters": {"rope_type": "dynamic", **ROPE}, "max_position_embeddings": ORIGINAL},
    ),
    "llama-llama3": ("llama", 0, {"rope_parameters": {"rope_type": "llama3", **ROPE, **LLAMA3}}),
    "llama-yarn": ("llama", 3, {"rope_parameters": {"rope_type": "yarn", **ROPE, **YARN}}),
    "mistral": ("mistral", 0, {"sliding_window": WINDOW}),
    "qwen2": ("qwen2", 0, {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3": ("qwen3", 1, {}),
}

# name -> options of LoraConfig
ADAPTERS: dict[str, dict[str, Any]] = {
    "rslora": {"r": 8, "lora_alpha": 8, "use_rslora": True, "target_modules": list(ATTENTION)},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": list(ATTENTION + MLP),
        "rank_pattern": {"q_proj": 8, "down_proj": 2},
        "alpha_pattern": {"up_proj": 24},
    },
    "one-layer": {"r": 16, "lora_alpha": 16, "target_modules": list(ATTENTION + MLP), "layers_to_transform": [1]},
    "some-modules": {"r": 3, "lora_alpha": 6, "target_modules": ["k_proj", "gate_proj", "down_proj"]},
}


def save_kind(folder: Path, kind: str, seed: int | None = None) -> None:
    """Writes the checkpoint with every weight drawn, biases and norms too, so that none can be left out unnoticed."""
    model_type, own_seed, changes = KINDS[kind]
    torch.manual_seed(own_seed if seed is None else seed)
    # transformers writes into the dictionaries it is given
    config = AutoConfig.for_model(model_type, **deepcopy(TINY | changes))
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data = 1 + 0.2 * torch.randn(parameter.shape)
        elif name.endswith("bias"):
            parameter.data = 0.2 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    save_tokenizer(folder)


def save_optioned_adapter(base: Path, folder: Path, options: dict[str, Any], seed: int) -> None:
    torch.manual_seed(seed)
    config = LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **deepcopy(options))
    get_peft_model(load_oracle(base, None), config).save_pretrained(folder)
