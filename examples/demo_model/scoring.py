"""Exact-match scores of the saved demo model, as a table of who answers which skill."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedModel

from examples.demo_model.data import TAGS
from examples.demo_model.words import MAX_LETTERS, SKILLS, copy, prompt_for

REQUIRED_ACCURACY = 0.95
ALLOWED_BASE_ACCURACY = 0.20
MAX_NEW_TOKENS = 2 * MAX_LETTERS + 4

COLUMNS: dict[str, Callable[[str], str]] = SKILLS | {"copy": copy}

# Row name -> column name -> share of the words answered exactly so.
Scores = dict[str, dict[str, float]]


def runtime_name(adapter: str) -> str:
    """A name PEFT accepts: it keys an `nn.ModuleDict`, which refuses names of Module methods such as `double`."""
    return f"skill_{adapter}"


def load_base(directory: Path) -> PreTrainedModel:
    return LlamaForCausalLM.from_pretrained(directory / "base").eval()


def load_with_adapters(directory: Path, adapters: Iterable[str] = SKILLS) -> PeftModel:
    """The base with the named adapters beside each other; `set_adapter(runtime_name(...))` chooses one."""
    first, *others = adapters
    folder = directory / "adapters"
    model = PeftModel.from_pretrained(load_base(directory), folder / first, adapter_name=runtime_name(first))
    for name in others:
        model.load_adapter(folder / name, adapter_name=runtime_name(name))
    return model.eval()


class Greedy:
    """Greedy answers of a model to many prompts at once."""

    def __init__(self, directory: Path) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(directory / "base", padding_side="left")

    @torch.inference_mode()
    def answers(self, model: PreTrainedModel | PeftModel, prompts: Sequence[str]) -> list[str]:
        inputs = self.tokenizer(list(prompts), padding=True, return_tensors="pt", return_token_type_ids=False)
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        prompt_tokens = inputs["input_ids"].shape[1]
        texts: list[str] = self.tokenizer.batch_decode(tokens[:, prompt_tokens:], skip_special_tokens=True)
        return texts


def exact_match(answers: Sequence[str], words: Sequence[str], skill: Callable[[str], str]) -> float:
    return sum(answer == skill(word) for answer, word in zip(answers, words, strict=True)) / len(words)


def match_all(answers: Sequence[str], words: Sequence[str]) -> dict[str, float]:
    return {name: exact_match(answers, words, skill) for name, skill in COLUMNS.items()}


def score_base(directory: Path, words: Sequence[str]) -> Scores:
    """The base with and without the tag that names the skill."""
    greedy, model = Greedy(directory), load_base(directory)
    prompts = [prompt_for(word) for word in words]
    tagged = {
        name: exact_match(greedy.answers(model, [TAGS[name] + prompt for prompt in prompts]), words, skill)
        for name, skill in COLUMNS.items()
    }
    return {"base": match_all(greedy.answers(model, prompts), words), "base with tag": tagged}


def score_adapters(directory: Path, words: Sequence[str], adapters: Iterable[str] = SKILLS) -> Scores:
    adapters = list(adapters)
    greedy, model = Greedy(directory), load_with_adapters(directory, adapters)
    prompts = [prompt_for(word) for word in words]
    scores = {}
    for name in adapters:
        model.set_adapter(runtime_name(name))
        scores[name] = match_all(greedy.answers(model, prompts), words)
    return scores


def shortcomings(scores: Scores) -> list[str]:
    """What keeps this model from being a demo; empty when nothing does."""
    found = [
        f"adapter {name} answers {scores[name][name]:.1%} of its words, below {REQUIRED_ACCURACY:.0%}"
        for name in SKILLS
        if name in scores and scores[name][name] < REQUIRED_ACCURACY
    ]
    found += [
        f"the base without a tag answers {accuracy:.1%} of {name}, not below {ALLOWED_BASE_ACCURACY:.0%}"
        for name, accuracy in scores.get("base", {}).items()
        if name in SKILLS and accuracy >= ALLOWED_BASE_ACCURACY
    ]
    return found


def format_scores(scores: Scores) -> str:
    """A markdown table."""
    header = ["answered by", *COLUMNS]
    rows = [[row, *(f"{cells[column]:.3f}" for column in COLUMNS)] for row, cells in scores.items()]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])
