"""A tiny random Llama with random PEFT adapters, and the oracle that says what each must answer."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
NUM_TOKENS = 64
VOCAB_SIZE = 259
# Of the best logit over the second, at every step of every oracle: far more than float32 can move.
MIN_MARGIN = 1e-3


# Far more than a stream can get before a test ends it; and a context and a pool for many of them. The part of the pool
# that is not written takes no memory.
ENDLESS = 30_000
LONG_CONTEXT = 32_768
ENDLESS_POOL = ["--memory", "2GiB"]


@dataclass(frozen=True)
class AdapterRecipe:
    """One random adapter: rank, alpha and the modules it changes."""

    lora_rank: int
    lora_alpha: int
    modules: tuple[str, ...]


@dataclass(frozen=True)
class TinyModel:
    """A base, its adapters by id, and what the oracle answers to each one's prompt (`""` is the base)."""

    base: Path
    adapters: dict[str, Path]
    prompts: dict[str, list[int]]
    answers: dict[str, list[int]]


# The ranks of the acceptance test with targets that differ in every way.
PARITY_ADAPTERS = {
    "rank-1": AdapterRecipe(1, 4, ATTENTION + MLP),
    "rank-3": AdapterRecipe(3, 6, ("q_proj", "v_proj", "down_proj")),
    "rank-8": AdapterRecipe(8, 16, MLP),
    "rank-16": AdapterRecipe(16, 32, ATTENTION),
    "rank-24": AdapterRecipe(24, 24, ("o_proj", "down_proj")),
    "rank-32": AdapterRecipe(32, 32, ("k_proj", "v_proj", "up_proj")),
    "rank-64": AdapterRecipe(64, 64, ATTENTION + MLP),
    "rank-128": AdapterRecipe(128, 128, ("q_proj", "v_proj", "up_proj")),
}


def save_base(folder: Path, seed: int = 0, hidden_size: int = 64) -> None:
    """Writes a checkpoint whose weights are wide enough that greedy decoding is rarely close to a tie."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.25,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)


def save_tokenizer(folder: Path) -> None:
    """Bytes as tokens: id = byte + 3 after <pad>, <s>, </s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, **{character: 3 + index for index, character in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))


def save_adapter(base: Path, folder: Path, recipe: AdapterRecipe, seed: int) -> None:
    """Writes one PEFT adapter with both matrices drawn at random: PEFT's default B of zeros would equal the base."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        target_modules=list(recipe.modules),
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    get_peft_model(LlamaForCausalLM.from_pretrained(base), config).save_pretrained(folder)


def prompt_for(index: int) -> list[int]:
    """A prompt of its own length for each adapter: 20 to 60 tokens."""
    return [1] + [3 + (37 * position + 11 * index) % 250 for position in range(20 + 5 * index)]


def load_oracle(base: Path, adapter: Path | None) -> torch.nn.Module:
    """transformers, and peft when `adapter` is given, in float32."""
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    return model.eval()


def greedy(model: torch.nn.Module, prompt: list[int], num_tokens: int = NUM_TOKENS) -> tuple[list[int], float]:
    """Greedy continuation, end-of-sequence ignored, and the smallest distance of the best logit to the second."""
    tokens, margin = list(prompt), float("inf")
    past, fed = None, prompt
    with torch.inference_mode():
        for _ in range(num_tokens):
            output = model(input_ids=torch.tensor([fed]), past_key_values=past, use_cache=True)
            best = output.logits[0, -1].topk(2)
            margin = min(margin, float(best.values[0] - best.values[1]))
            fed, past = [int(best.indices[0])], output.past_key_values
            tokens += fed
    return tokens[len(prompt) :], margin


def differing(answers: dict[str, list[int]], expected: dict[str, list[int]]) -> set[str]:
    """Adapters whose greedy tokens are not the oracle's: the parity check itself."""
    assert answers.keys() == expected.keys()
    return {name for name in expected if answers[name] != expected[name]}


def with_long_context(base: Path, folder: Path) -> Path:
    """The same weights: rotary embedding does not depend on the length of the context."""
    copy = Path(shutil.copytree(base, folder))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "max_position_embeddings": LONG_CONTEXT}))
    return copy
