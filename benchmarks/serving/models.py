"""Models S and M as Hugging Face checkpoints, and adapters as PEFT saves them, with random weights."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.kernels.models import RANKS, Size
from benchmarks.serving.workload import BFLOAT16

CONTEXT_TOKENS = 1024
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
# A rank-64 delta is about half as large as what it is added to.
B_SPREAD = 0.05


@dataclass(frozen=True, slots=True)
class Recipe:
    """What one adapter is."""

    lora_rank: int
    modules: tuple[str, ...]

    @classmethod
    def of(cls, index: int) -> "Recipe":
        """Ranks 8, 16, 32, 64 in turn on q, k, v, o; every fourth adapter, those of rank 64, also on the MLP."""
        return cls(RANKS[index % 4], ATTENTION + MLP if index % 4 == 3 else ATTENTION)


def adapter_name(index: int) -> str:
    return f"adapter-{index:03d}"


def save_base(folder: Path, size: Size, seed: int = 0) -> None:
    """Each matrix keeps the size of what it multiplies, so that no layer is lost in another's noise."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size.vocab,
            hidden_size=size.hidden,
            intermediate_size=size.intermediate,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.kv_heads,
            max_position_embeddings=CONTEXT_TOKENS,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            spread = 1.0 if "embed" in name else parameter.shape[1] ** -0.5
            parameter.data.normal_(0.0, spread)
    model.save_pretrained(folder)
    words = {f"w{token}": token for token in range(size.vocab)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))


def save_adapters(base: Path, folder: Path, indices: Iterable[int]) -> None:
    """Adapter `index` depends on nothing but its index and the shapes of the base; see workload.BFLOAT16."""
    recipes: dict[Recipe, list[int]] = {}
    for index in indices:
        recipes.setdefault(Recipe.of(index), []).append(index)
    for recipe, members in recipes.items():
        model = _with_adapter(base, recipe)
        for index in members:
            generator = torch.Generator().manual_seed(1000 + index % BFLOAT16)
            for name, parameter in model.named_parameters():
                if "lora_A" in name:
                    parameter.data.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
                elif "lora_B" in name:
                    parameter.data.normal_(0.0, B_SPREAD, generator=generator)
            model.save_pretrained(folder / adapter_name(index))
            if index >= BFLOAT16:
                _round(folder / adapter_name(index) / "adapter_model.safetensors")


def _round(path: Path) -> None:
    """Writes a file of float32 once more, its tensors in bfloat16."""
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def _with_adapter(base: Path, recipe: Recipe) -> PeftModel:
    config = LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=2 * recipe.lora_rank,
        target_modules=list(recipe.modules),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
