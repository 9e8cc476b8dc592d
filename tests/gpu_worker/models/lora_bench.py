"""A base model with several PEFT adapters, in peft and in the product's form."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from common.packing import MODULE_INDEX, MODULES
from gpu_worker.models import Decoder, load_model
from kernels.adapters import AdapterTables
from tests.gpu_worker.models.checkpoints import draw_tokens, float32_relative, oracle_logits, random_model, save
from tests.gpu_worker.models.stepper import Running
from tests.kernels.adapter_pool import Adapter, LoraWeights, build_tables

STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Recipe:
    """What an adapter_config.json says, and the dtype its weights are stored in."""

    lora_rank: int
    alpha: int
    targets: Sequence[str] = MODULES
    # None = all
    layers: list[int] | None = None
    dtype: str = "float32"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, int] = field(default_factory=dict)
    use_rslora: bool = False

    def to_peft(self) -> Any:
        return LoraConfig(
            r=self.lora_rank,
            lora_alpha=self.alpha,
            target_modules=list(self.targets),
            layers_to_transform=self.layers,
            rank_pattern=dict(self.rank_pattern),
            alpha_pattern=dict(self.alpha_pattern),
            use_rslora=self.use_rslora,
            init_lora_weights=False,
            lora_dropout=0.0,
        )

    def scaling(self, path: str) -> float:
        """From the recipe alone, not from peft. path: the module's name in the model."""
        alpha = _of_pattern(self.alpha_pattern, path, self.alpha)
        lora_rank = _of_pattern(self.rank_pattern, path, self.lora_rank)
        return alpha / (sqrt(lora_rank) if self.use_rslora else lora_rank)


def _of_pattern(pattern: Mapping[str, int], path: str, default: int) -> int:
    return next((value for key, value in pattern.items() if path.endswith("." + key)), default)


RECIPES = [
    Recipe(1, 2, ["q_proj", "v_proj"]),
    Recipe(3, 3, dtype="bfloat16"),
    Recipe(8, 16, ["o_proj", "gate_proj", "down_proj"], [1, 2], "float16"),
    Recipe(16, 8, ["k_proj", "up_proj"], [0]),
    Recipe(8, 4),
    Recipe(
        4,
        6,
        rank_pattern={"q_proj": 2, "layers.1.mlp.down_proj": 7},
        alpha_pattern={"v_proj": 20, "layers.2.self_attn.o_proj": 1},
    ),
    Recipe(9, 5, ["q_proj", "v_proj", "up_proj"], [0, 2], "bfloat16", {"v_proj": 3}, use_rslora=True),
]
PATTERNS, RSLORA = 5, 6


@dataclass(frozen=True, slots=True)
class Bench:
    """Adapter i of the tables is the i-th of RECIPES, `adapter-i` in the oracle."""

    oracle: Any
    decoder: Decoder
    tables: AdapterTables
    float32_relative: float

    def wanted(self, sequence: Running) -> Tensor:
        """`[num_tokens, vocab]` float32."""
        if sequence.adapter < 0:
            with self.oracle.disable_adapter():
                return oracle_logits(self.oracle, sequence.tokens)
        self.oracle.set_adapter(f"adapter-{sequence.adapter}")
        return oracle_logits(self.oracle, sequence.tokens)


def build_bench(variant: str, directory: Path) -> Bench:
    model = random_model(variant)
    decoder = load_model(save(model, directory), "float32", "cpu")
    relative = float32_relative(model, max(recipe.lora_rank for recipe in RECIPES))
    torch.manual_seed(12)
    oracle = get_peft_model(model, RECIPES[0].to_peft(), adapter_name="adapter-0")
    for index, recipe in enumerate(RECIPES[1:], start=1):
        oracle.add_adapter(f"adapter-{index}", recipe.to_peft())
    return Bench(oracle.eval(), decoder, pack(oracle, RECIPES), relative)


def pack(oracle: Any, recipes: Sequence[Recipe]) -> AdapterTables:
    """The oracle's adapters in pages, scaled as the recipes say."""
    adapters = [take_adapter(oracle, f"adapter-{index}", recipe) for index, recipe in enumerate(recipes)]
    return build_tables(adapters, 3, 4096, torch.Generator().manual_seed(13))


def take_adapter(oracle: Any, name: str, recipe: Recipe) -> Adapter:
    """Reads an adapter out of peft, after rounding peft's own copy as the stored one is."""
    modules = {}
    for path, layer in oracle.named_modules():
        if name in getattr(layer, "lora_A", {}):
            pair = [getattr(layer, part)[name].weight for part in ("lora_A", "lora_B")]
            stored = [weight.data.to(STORED[recipe.dtype]) for weight in pair]
            for weight, rounded in zip(pair, stored, strict=True):
                weight.data = rounded.to(weight.dtype)
            parts = path.split(".")
            place = int(parts[parts.index("layers") + 1]), MODULE_INDEX[parts[-1]]
            modules[place] = LoraWeights(stored[0], stored[1], recipe.scaling(path))
    return Adapter(recipe.dtype, modules)


def mixed_batch() -> list[Running]:
    """Every adapter and the base; adapter 4 and the base have two sequences each, 5 to 32 tokens long."""
    adapters = [-1, 0, 1, 2, 3, 4, 4, 5, 6, -1]
    return [Running(draw_tokens(5 + 3 * seed, seed), adapter) for seed, adapter in enumerate(adapters)]
