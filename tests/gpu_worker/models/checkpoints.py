"""Tiny random Llamas, saved as transformers saves them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 97

TINY: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "attn_implementation": "eager",
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha-tied": {"num_key_value_heads": 6, "tie_word_embeddings": True},
    "mqa-head-dim-20": {"num_key_value_heads": 1, "head_dim": 20},
    "llama3-rope": {"rope_parameters": LLAMA3_ROPE},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "biases": {"attention_bias": True, "mlp_bias": True},
}


def random_llama(**changes: Any) -> LlamaForCausalLM:
    """Every weight drawn, biases and norms too, so that none can be left out unnoticed."""
    torch.manual_seed(11)
    model = LlamaForCausalLM(LlamaConfig(**(TINY | changes))).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        spread = 0.3 * torch.randn(parameter.shape)
        parameter.data = 1 + spread if name.endswith("norm.weight") else spread
    return model


def save(model: LlamaForCausalLM, directory: Path, **options: Any) -> Path:
    model.save_pretrained(directory, **options)
    return directory


def draw_tokens(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    drawn: list[int] = torch.randint(VOCAB, (length,), generator=generator).tolist()
    return drawn


def oracle_logits(model: Any, tokens: list[int]) -> Tensor:
    """`[num_tokens, vocab]` float32 of one sequence alone."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([tokens])).logits[0]
    return logits.float()
