"""Tiny random models of every family, saved as transformers saves them, and what transformers answers."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 97
# Longest sequence of the tests.
CONTEXT = 33
# Length before scaling in ROPE_KINDS, and the sliding window: the longest sequences cross both.
ORIGINAL, WINDOW = 16, 8

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
    "original_max_position_embeddings": ORIGINAL,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
    "beta_fast": 2.0,
    "beta_slow": 0.2,
}

# Changes of the config; each kind gives other logits than each other kind.
ROPE_KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        "max_position_embeddings": ORIGINAL,
    },
    "llama3": {"rope_parameters": LLAMA3_ROPE},
    "yarn": {"rope_parameters": YARN_ROPE},
}

# model_type and changes of TINY. The first of a family is its plainest.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-mha-tied": ("llama", {"num_key_value_heads": 6, "tie_word_embeddings": True}),
    "llama-mqa-head-dim-20": ("llama", {"num_key_value_heads": 1, "head_dim": 20}),
    "llama-theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "mistral-no-window": ("mistral", {"sliding_window": None, "head_dim": 20}),
    # what transformers makes of a mistral config.json that has layer_types
    "mistral-layer-types": (
        "ministral",
        {
            "sliding_window": WINDOW,
            "head_dim": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen2-unused-window-tied": ("qwen2", {"sliding_window": WINDOW, "tie_word_embeddings": True}),
    "qwen2-layer-types": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 20}),
    "qwen3-biases-window": (
        "qwen3",
        {
            "head_dim": 12,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 2,
        },
    ),
}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
WINDOWED = ("mistral", "mistral-layer-types", "qwen2", "qwen2-layer-types", "qwen3-biases-window")


def random_model(variant: str = "llama", **changes: Any) -> Any:
    """Every weight drawn, biases and norms too, so that none can be left out unnoticed."""
    torch.manual_seed(11)
    model_type, fields = VARIANTS[variant]
    # transformers writes into the dictionaries it is given
    config = AutoConfig.for_model(model_type, **deepcopy(TINY | fields | changes))
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        spread = 0.3 * torch.randn(parameter.shape)
        parameter.data = 1 + spread if name.endswith("norm.weight") else spread
    return model


def save(model: Any, directory: Path, **options: Any) -> Path:
    model.save_pretrained(directory, **options)
    if model.config.model_type == "ministral":
        edit_config(directory, model_type="mistral")
    return directory


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def draw_tokens(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    drawn: list[int] = torch.randint(VOCAB, (length,), generator=generator).tolist()
    return drawn


def oracle_logits(model: Any, tokens: list[int]) -> Tensor:
    """`[num_tokens, vocab]` float32 of one sequence alone.

    With dynamic rope token by token: frequencies by length are defined for no other feeding, see `DynamicScaling`.
    """
    is_dynamic = model.config.rope_parameters["rope_type"] == "dynamic"
    return token_by_token_logits(model, tokens) if is_dynamic else whole_logits(model, tokens)


def whole_logits(model: Any, tokens: list[int]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    return logits.float()


def token_by_token_logits(model: Any, tokens: list[int]) -> Tensor:
    rows, cache = [], None
    with torch.no_grad():
        for token in tokens:
            output = model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            rows.append(output.logits[0])
    return torch.cat(rows).float()


def float32_relative(model: Any, max_lora_rank: int = 0) -> float:
    """How far two float32 runs may be apart, of the largest logit.

    A logit is the end of a chain of sums; a float32 sum of n terms in another order differs by at most n * eps of its
    magnitude. In a layer: the query's norm, q k v, the scores, the mixing, o, gate up, down; the way through A and B
    is longer than the way past them by the rank, four times a layer.
    """
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 2 * head_dim + CONTEXT + config.num_attention_heads * head_dim
    terms = 2 * config.hidden_size + attention + config.intermediate_size + 4 * max_lora_rank
    total: int = config.num_hidden_layers * terms + config.hidden_size
    return total * torch.finfo(torch.float32).eps
