"""Cosines and sines against transformers' own rotary embedding."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from gpu_worker.models.config import ModelConfig
from gpu_worker.models.rope import cos_sin_table
from tests.gpu_worker.models.checkpoints import LLAMA3_ROPE, ORIGINAL, ROPE_KINDS, TINY, YARN_ROPE

LLAMA31 = LLAMA3_ROPE | {"rope_theta": 500000.0, "original_max_position_embeddings": 8192}
QWEN25_YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768}

EXACT: dict[str, dict[str, Any]] = {kind: changes for kind, changes in ROPE_KINDS.items() if kind != "dynamic"} | {
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "linear-by-a-fraction": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.7}},
    "llama-3.1": {"rope_parameters": LLAMA31, "head_dim": 128, "max_position_embeddings": 131072},
    "qwen2.5-yarn": {"rope_parameters": QWEN25_YARN, "head_dim": 128, "max_position_embeddings": 32768},
    "yarn-defaults": {"rope_parameters": YARN_ROPE | {"beta_fast": None, "beta_slow": None}},
    "yarn-mscale": {"rope_parameters": YARN_ROPE | {"mscale": 1.0, "mscale_all_dim": 0.707}},
    "yarn-one-mscale": {"rope_parameters": YARN_ROPE | {"mscale": 2.0}},
    "yarn-attention-factor": {"rope_parameters": YARN_ROPE | {"attention_factor": 0.7, "mscale": 2.0}},
    "yarn-not-truncated": {"rope_parameters": YARN_ROPE | {"truncate": False}, "head_dim": 64},
    "yarn-a-step": {"rope_parameters": YARN_ROPE | {"beta_fast": 1.0, "beta_slow": 1.0, "truncate": False}},
    "yarn-factor-below-1": {"rope_parameters": YARN_ROPE | {"factor": 0.5}},
    "yarn-factor-null": {"rope_parameters": YARN_ROPE | {"factor": None}},
    "original-length-at-the-top": {"rope_parameters": YARN_ROPE, "original_max_position_embeddings": 24},
}
CASES = EXACT | {"dynamic": ROPE_KINDS["dynamic"]}


def llama_config(case: str, **changes: Any) -> LlamaConfig:
    # transformers writes into the dictionaries it is given
    return LlamaConfig(**deepcopy(TINY | CASES[case] | changes))


def our_table(theirs: LlamaConfig) -> Tensor:
    config = ModelConfig.from_hf(theirs.to_dict())
    return cos_sin_table(config.rope, config.geometry.head_dim, 64)


def their_table(config: LlamaConfig, num_positions: int) -> Tensor:
    """`[num_positions, 2, head_dim / 2]`, each position in a call of its own as when decoding."""
    embedding, half = LlamaRotaryEmbedding(config), config.head_dim // 2
    rows = [torch.cat(embedding(torch.zeros(1), torch.tensor([[position]]))) for position in range(num_positions)]
    return torch.stack(rows)[:, :, 0, :half]


@pytest.mark.parametrize("case", EXACT)
def test_equals_transformers_bit_for_bit(case: str) -> None:
    theirs = llama_config(case)
    assert torch.equal(our_table(theirs), their_table(theirs, 64))


@pytest.mark.parametrize("changes", [{}, {"head_dim": 20}, {"head_dim": 128}], ids=str)
def test_dynamic_equals_transformers_to_the_last_place(changes: dict[str, int]) -> None:
    """torch raises one number and many to a power by other code, which may round the grown theta, and with it each
    frequency, to its neighbour; an angle is 63 times that."""
    theirs = llama_config("dynamic", **changes)
    assert float((our_table(theirs) - their_table(theirs, 64)).abs().max()) <= 63 * 3 * torch.finfo(torch.float32).eps


def test_llama3_leaves_short_keeps_long_and_mixes_between() -> None:
    """At position 1 the angle is the frequency itself, below pi here."""
    stretched, frequencies = (frequencies_of(case) for case in ("llama3", "default"))
    wavelength = 2 * torch.pi / frequencies
    assert torch.allclose(stretched[wavelength < 4], frequencies[wavelength < 4])
    between = (wavelength > 4.1) & (wavelength < 15.9)
    assert between.any()
    assert (stretched[between] < frequencies[between]).all()
    assert (stretched[between] > frequencies[between] / 8).all()


def frequencies_of(case: str) -> Tensor:
    return our_table(llama_config(case, head_dim=32))[1, 0].double().acos()


def test_dynamic_is_default_up_to_the_original_length_and_slower_after_it() -> None:
    dynamic, default = (our_table(llama_config(kind)) for kind in ("dynamic", "default"))
    assert torch.equal(dynamic[:ORIGINAL], default[:ORIGINAL])
    # the second frequency, its angle below pi at this position
    assert dynamic[ORIGINAL, 0, 1] > default[ORIGINAL, 0, 1]


@pytest.mark.parametrize(
    ("case", "context_tokens"),
    [("default", 64), ("linear", 64), ("llama3", 64), ("yarn", 64), ("dynamic", 64), ("qwen2.5-yarn", 131072)],
)
def test_the_context_is_what_scaling_makes_of_it(case: str, context_tokens: int) -> None:
    config = ModelConfig.from_hf(llama_config(case).to_dict())
    assert config.geometry.max_context_tokens == context_tokens
