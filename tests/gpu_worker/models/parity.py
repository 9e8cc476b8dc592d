"""Feeding a decoder in every way and comparing it with transformers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gpu_worker.models import Decoder
from tests.gpu_worker.models.checkpoints import CONTEXT, draw_tokens, float32_relative, oracle_logits
from tests.gpu_worker.models.stepper import Running, Stepper

LENGTHS = (1, 7, CONTEXT)
SCHEDULES = ("whole", "chunks-of-5", "decode")


def running(lengths: Sequence[int] = LENGTHS) -> list[Running]:
    return [Running(draw_tokens(length, seed)) for seed, length in enumerate(lengths)]


def decode(decoder: Decoder, sequences: list[Running], schedule: str) -> None:
    """Whole prompts; chunks of 5; or the first 5 tokens in one chunk and the rest token by token."""
    stepper = Stepper(decoder, sequences)
    if schedule == "decode":
        stepper.step([min(5, len(sequence.tokens)) for sequence in stepper.sequences])
    stepper.run({"whole": CONTEXT, "chunks-of-5": 5, "decode": 1}[schedule])


def all_logits(decoder: Decoder, schedule: str = "whole") -> list[Tensor]:
    """`[num_tokens, vocab]` float32 of each of the `running` sequences."""
    sequences = running()
    decode(decoder, sequences, schedule)
    return [torch.cat(sequence.logits) for sequence in sequences]


def all_oracle_logits(model: Any) -> list[Tensor]:
    return [oracle_logits(model, sequence.tokens) for sequence in running()]


def error(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest difference, of the largest wanted logit."""
    return float((torch.cat(found) - torch.cat(wanted)).abs().max() / torch.cat(wanted).abs().max())


def assert_equal(decoder: Decoder, model: Any, schedule: str) -> None:
    assert error(all_logits(decoder, schedule), all_oracle_logits(model)) <= float32_relative(model)


def assert_noticed(decoder: Decoder, model: Any) -> None:
    """A defect stands out by far: rounding takes a twentieth of the tolerance, each defect here over 1000 times it."""
    assert error(all_logits(decoder), all_oracle_logits(model)) > 1000 * float32_relative(model)
