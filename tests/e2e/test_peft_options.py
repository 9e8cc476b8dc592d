"""Adapters that PEFT saved with each option that is claimed, uploaded through the gateway and served: PEFT's tokens."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from loraplex import AsyncClient
from tests.e2e.support import all_at_once, assert_books_balance, running_fleet
from tests.e2e.tiny_model import ATTENTION, MIN_MARGIN, MLP, TinyModel, greedy, load_oracle, prompt_for

NUM_TOKENS = 24
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

pytestmark = [
    # PEFT warns of use_rslora beside patterns, although it does what it says.
    pytest.mark.filterwarnings("ignore:.*use_rslora.*"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]

Tensors = dict[str, torch.Tensor]


def as_dtype(dtype: torch.dtype) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()}


def with_default(tensors: Tensors) -> Tensors:
    return {name.replace(".weight", ".default.weight"): tensor for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Saved:
    """Options of LoraConfig, and what happens to the tensors after PEFT has saved them."""

    options: dict[str, Any] = field(default_factory=dict)
    change: Callable[[Tensors], Tensors] | None = None
    # What PEFT itself cannot load after the change.
    oracle_first: bool = False
    # Adapters of the model without its head have no inner `model.` in their names.
    headless: bool = False


PATTERNS: dict[str, Any] = {
    "rank_pattern": {"k_proj": 1, "mlp.up_proj": 9, "^model.layers.1.self_attn.q_proj": 2},
    "alpha_pattern": {"layers.0.self_attn.v_proj": 3, "v_proj": 40, "down_proj": 5},
}
ADAPTERS = {
    "plain": Saved(),
    "rslora": Saved({"use_rslora": True}),
    "patterns": Saved(PATTERNS),
    "rslora-patterns": Saved({"use_rslora": True, **PATTERNS}),
    "all-linear": Saved({"target_modules": "all-linear"}),
    "regex": Saved({"target_modules": r".*\.1\..*(q|v|up)_proj"}),
    "some-layers": Saved({"layers_to_transform": [0, 2]}),
    "excluded": Saved({"exclude_modules": ["k_proj", "gate_proj"]}),
    "float16": Saved(change=as_dtype(torch.float16)),
    "bfloat16": Saved(change=as_dtype(torch.bfloat16)),
    "default-names": Saved(change=with_default, oracle_first=True),
    "headless": Saved(headless=True),
}


def save(base: Path, folder: Path, saved: Saved, seed: int) -> None:
    torch.manual_seed(seed)
    options: dict[str, Any] = {"r": 6, "lora_alpha": 12, "target_modules": [*ATTENTION, *MLP]} | saved.options
    model = LlamaForCausalLM.from_pretrained(base)
    adapted = get_peft_model(
        model.model if saved.headless else model,
        LoraConfig(init_lora_weights=False, task_type=None if saved.headless else "CAUSAL_LM", **options),
    )
    adapted.save_pretrained(folder, save_embedding_layers=False)


def oracle(base: Path, folder: Path, saved: Saved) -> torch.nn.Module:
    if not saved.headless:
        return load_oracle(base, folder)
    model: Any = load_oracle(base, None)
    model.model = PeftModel.from_pretrained(model.model, folder)
    evaluated: torch.nn.Module = model.eval()
    return evaluated


async def test_every_option_that_is_claimed_is_served_as_peft_computes_it(tiny: TinyModel, tmp_path: Path) -> None:
    prompts, expected, folders = {}, {}, {}
    for index, (name, saved) in enumerate(ADAPTERS.items()):
        folder = folders[name] = tmp_path / name
        save(tiny.base, folder, saved, seed=900 + index)
        # What the tokens come from before the change is what they must come from after it, when PEFT cannot tell.
        model = oracle(tiny.base, folder, saved) if saved.oracle_first else None
        if saved.change is not None:
            save_file(saved.change(load_file(folder / WEIGHTS)), folder / WEIGHTS)
        prompts[name] = prompt_for(index)
        expected[name], margin = greedy(model or oracle(tiny.base, folder, saved), prompts[name], NUM_TOKENS)
        assert margin > MIN_MARGIN, f"the oracle is within {margin} of a tie on {name}"
    with running_fleet(tiny.base, tmp_path / "fleet", folders) as fleet:
        async with AsyncClient(fleet.gateway.address) as client:
            assert await all_at_once(client, prompts, NUM_TOKENS) == expected
        assert_books_balance(fleet.workers[0])


@pytest.mark.parametrize(
    ("name", "without"),
    [
        ("rslora", {"use_rslora": False}),
        ("patterns", {"alpha_pattern": {}}),
        ("rslora-patterns", {"use_rslora": False}),
        ("some-layers", None),
    ],
)
def test_an_option_that_is_left_out_gives_other_tokens(
    tiny: TinyModel, tmp_path: Path, name: str, without: dict[str, Any] | None
) -> None:
    """The control of the test above: what it compares depends on the options."""
    folder, saved, index = tmp_path / name, ADAPTERS[name], list(ADAPTERS).index(name)
    save(tiny.base, folder, saved, seed=900 + index)
    prompt = prompt_for(index)
    expected, _ = greedy(oracle(tiny.base, folder, saved), prompt, NUM_TOKENS)
    if without is not None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | without))
    other = folder if without is not None else None
    assert greedy(load_oracle(tiny.base, other), prompt, NUM_TOKENS)[0] != expected
