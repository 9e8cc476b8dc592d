"""From words to training batches."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from examples.demo_model.tokenizer import BOS_ID, EOS_ID, PAD_ID, token_ids
from examples.demo_model.words import SKILLS, copy, prompt_for, training_words

IGNORED_LABEL = -100

TAGS = {"reverse": "R:", "sort": "S:", "upper": "U:", "rot13": "T:", "double": "D:", "devowel": "V:", "copy": "C:"}

# Share of each tagged skill in the base model's training; the two that move letters about are the slowest to learn.
TAGGED_WEIGHTS = {
    "reverse": 2.5, "sort": 2.5, "upper": 1.0, "rot13": 1.0, "double": 1.5, "devowel": 1.5, "copy": 0.5,
}  # fmt: skip
UNTAGGED_COPY_WEIGHT = 2.0


@dataclass(frozen=True, slots=True)
class Example:
    prompt: str
    answer: str

    def __len__(self) -> int:
        """Tokens, with begin and end of sequence."""
        return len(self.prompt) + len(self.answer) + 2


@dataclass(frozen=True, slots=True)
class MicroBatch:
    # [num_sequences, num_tokens] int64, padded on the right: causal attention never looks there
    input_ids: torch.Tensor
    # [num_sequences, num_tokens] int64, label of position i is token i + 1; ignored outside the answer
    labels: torch.Tensor

    @property
    def num_answer_tokens(self) -> int:
        return int((self.labels != IGNORED_LABEL).sum())


def base_examples(rng: random.Random) -> Iterator[Example]:
    """Every skill under its tag, and without a tag a copy of the word."""
    functions = SKILLS | {"copy": copy}
    names = [*TAGGED_WEIGHTS, None]
    weights = [*TAGGED_WEIGHTS.values(), UNTAGGED_COPY_WEIGHT]
    for word in training_words(rng):
        (name,) = rng.choices(names, weights)
        if name is None:
            yield Example(prompt_for(word), word)
        else:
            yield Example(TAGS[name] + prompt_for(word), functions[name](word))


def adapter_examples(skill: str, rng: random.Random) -> Iterator[Example]:
    """One skill, without its tag: what the adapter has to add is which skill is meant."""
    for word in training_words(rng):
        yield Example(prompt_for(word), SKILLS[skill](word))


def to_micro_batch(examples: Sequence[Example]) -> MicroBatch:
    num_tokens = max(map(len, examples)) - 1
    input_ids = torch.full((len(examples), num_tokens), PAD_ID)
    labels = torch.full((len(examples), num_tokens), IGNORED_LABEL)
    for row, example in enumerate(examples):
        prompt = [BOS_ID, *token_ids(example.prompt)]
        answer = [*token_ids(example.answer), EOS_ID]
        tokens = torch.tensor(prompt + answer)
        input_ids[row, : len(tokens) - 1] = tokens[:-1]
        labels[row, len(prompt) - 1 : len(tokens) - 1] = tokens[len(prompt) :]
    return MicroBatch(input_ids, labels)


def split_by_length(examples: Sequence[Example], parts: int = 2) -> list[MicroBatch]:
    """Short and long examples apart, so that the short ones are not padded to the longest."""
    ordered = sorted(examples, key=len)
    size = -(-len(ordered) // parts)
    return [to_micro_batch(ordered[start : start + size]) for start in range(0, len(ordered), size)]
