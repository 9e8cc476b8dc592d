"""The decoder against transformers: the same logits for every token, however the tokens were fed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gpu_worker.models import Decoder, load_model
from tests.gpu_worker.models.checkpoints import LLAMA3_ROPE, VARIANTS, draw_tokens, oracle_logits, random_llama, save
from tests.gpu_worker.models.stepper import Running, Stepper

# A logit is the end of a chain of sums: 3 layers of (48 + 20 + 33 + 48 + 48 + 80) terms and the head's 48, about 900
# terms; a float32 sum of n terms in another order differs by at most n * eps of its magnitude.
FLOAT32_RELATIVE = 900 * torch.finfo(torch.float32).eps
LENGTHS = (1, 7, 33)


def running() -> list[Running]:
    return [Running(draw_tokens(length, seed)) for seed, length in enumerate(LENGTHS)]


def decode(decoder: Decoder, sequences: list[Running], schedule: str) -> None:
    """Whole prompts; chunks of 5; or the first 5 tokens in one chunk and the rest token by token."""
    stepper = Stepper(decoder, sequences)
    if schedule == "decode":
        stepper.step([min(5, len(sequence.tokens)) for sequence in stepper.sequences])
    stepper.run({"whole": 33, "chunks-of-5": 5, "decode": 1}[schedule])


def worst_error(model: Any, sequences: list[Running]) -> tuple[float, float]:
    """Largest difference from the oracle, and the oracle's largest logit."""
    worst, largest = 0.0, 0.0
    for sequence in sequences:
        wanted = oracle_logits(model, sequence.tokens)
        worst = max(worst, float((torch.cat(sequence.logits) - wanted).abs().max()))
        largest = max(largest, float(wanted.abs().max()))
    return worst, largest


@pytest.mark.parametrize("schedule", ["whole", "chunks-of-5", "decode"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant: str, schedule: str, tmp_path: Path) -> None:
    model = random_llama(**VARIANTS[variant])
    decoder = load_model(save(model, tmp_path), "float32", "cpu")
    sequences = running()
    decode(decoder, sequences, schedule)
    worst, largest = worst_error(model, sequences)
    assert worst <= FLOAT32_RELATIVE * largest


def test_a_sharded_checkpoint(tmp_path: Path) -> None:
    model = random_llama()
    save(model, tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    sequences = running()
    decode(load_model(tmp_path, "float32", "cpu"), sequences, "whole")
    worst, largest = worst_error(model, sequences)
    assert worst <= FLOAT32_RELATIVE * largest


@pytest.mark.parametrize("schedule", ["whole", "decode"])
@pytest.mark.parametrize("variant", ["gqa", "biases"])
def test_bfloat16_is_as_good_as_transformers(variant: str, schedule: str, tmp_path: Path) -> None:
    """The error against float32 logits of the same weights is at most twice that of transformers' bfloat16 run: both
    round every activation once per operation, in another order."""
    rounded = random_llama(**VARIANTS[variant]).bfloat16()
    decoder = load_model(save(rounded, tmp_path), "auto", "cpu")
    assert decoder.dtype == torch.bfloat16
    sequences = running()
    decode(decoder, sequences, schedule)
    theirs = [oracle_logits(rounded, sequence.tokens) for sequence in sequences]
    exact = rounded.float()
    wanted = [oracle_logits(exact, sequence.tokens) for sequence in sequences]
    assert torch.cat(sequences[0].logits).dtype == torch.float32
    assert rms([torch.cat(sequence.logits) for sequence in sequences], wanted) <= 2 * rms(theirs, wanted)


def rms(values: list[Tensor], wanted: list[Tensor]) -> float:
    return float((torch.cat(values) - torch.cat(wanted)).square().mean().sqrt())


def test_a_wrong_rope_kind_is_noticed(tmp_path: Path) -> None:
    decoder = load_model(save(random_llama(), tmp_path), "float32", "cpu")
    sequences = running()
    decode(decoder, sequences, "whole")
    worst, largest = worst_error(random_llama(rope_parameters=LLAMA3_ROPE), sequences)
    assert worst > 1000 * FLOAT32_RELATIVE * largest


def test_only_the_wanted_rows_get_logits(tmp_path: Path) -> None:
    decoder = load_model(save(random_llama(), tmp_path), "float32", "cpu")
    sequences = running()
    stepper = Stepper(decoder, sequences)
    batch = stepper.batch([len(sequence.tokens) for sequence in stepper.sequences])
    every = decoder.forward(batch)
    rows = torch.tensor([40, 0, 7])
    some = decoder.forward(stepper.batch([1, 7, 33], rows))
    assert float((some - every[rows]).abs().max()) <= FLOAT32_RELATIVE * float(every.abs().max())
    assert decoder.forward(stepper.batch([1, 7, 33], rows[:0])).shape == (0, every.shape[1])


def test_tied_embeddings_are_stored_once(tmp_path: Path) -> None:
    decoder = load_model(save(random_llama(tie_word_embeddings=True), tmp_path), "float32", "cpu")
    assert decoder.weights.lm_head is decoder.weights.embedding
