"""A base model small enough to draw adapters for in milliseconds; only its config.json exists."""

import json
from pathlib import Path

NAME = "tiny-base"
CONFIG = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "vocab_size": 32,
    "max_position_embeddings": 64,
}
# Elements in, elements out.
SHAPES = {
    "q_proj": (48, 48),
    "k_proj": (48, 24),
    "v_proj": (48, 24),
    "o_proj": (48, 48),
    "gate_proj": (48, 80),
    "up_proj": (48, 80),
    "down_proj": (80, 48),
}


def write_base(folder: Path) -> Path:
    """A checkpoint folder named NAME inside `folder`."""
    model = folder / NAME
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIG))
    return model
