"""The training loop, for the base model and for an adapter alike."""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol, TextIO

import torch
import torch.nn.functional as F

from examples.demo_model.data import IGNORED_LABEL, Example, MicroBatch, split_by_length


@dataclass(frozen=True, slots=True)
class Recipe:
    steps: int
    batch_size: int
    peak_learning_rate: float
    warmup_steps: int
    weight_decay: float

    def learning_rate_factor(self, step: int) -> float:
        """Rise over the warm-up, stay at the peak until 30 % of the run, then fall linearly to 2 %."""
        warmup = min(1.0, (step + 1) / self.warmup_steps)
        fall = max(0.0, (step / self.steps - 0.3) / 0.7)
        return warmup * (1.0 - 0.98 * fall)


class StepListener(Protocol):
    def __call__(self, step: int, loss: float, num_tokens: int) -> None: ...


@dataclass(slots=True)
class Progress:
    """Shows step, loss, speed and time left: one updating line on a terminal, else a line every ten seconds."""

    title: str
    steps: int
    stream: TextIO = field(default_factory=lambda: sys.stderr)
    started: float = field(default_factory=time.monotonic)
    last_shown: float = field(default_factory=time.monotonic)
    tokens: int = 0

    def __call__(self, step: int, loss: float, num_tokens: int) -> None:
        self.tokens += num_tokens
        now = time.monotonic()
        is_terminal = self.stream.isatty()
        if step < self.steps and now - self.last_shown < (0.2 if is_terminal else 10.0):
            return
        self.last_shown = now
        elapsed = now - self.started
        left = elapsed / step * (self.steps - step)
        line = (
            f"{self.title:<16} step {step:>4}/{self.steps}  loss {loss:.4f}  "
            f"{self.tokens / elapsed:>6.0f} tokens/s  {elapsed:.0f} s gone, {left:.0f} s left"
        )
        end = "\n" if step == self.steps or not is_terminal else ""
        print(f"\r\x1b[K{line}" if is_terminal else line, end=end, file=self.stream, flush=True)


def summed_loss(model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
    """Cross-entropy summed over the answer tokens, a scalar."""
    logits = model(input_ids=batch.input_ids, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum")


def train(
    model: torch.nn.Module, examples: Iterator[Example], recipe: Recipe, on_step: StepListener | None = None
) -> list[float]:
    """Train what requires a gradient; return the loss of every step, in nats per answer token."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, recipe.peak_learning_rate, betas=(0.9, 0.99), weight_decay=recipe.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, recipe.learning_rate_factor)
    model.train()
    losses = []
    for step in range(1, recipe.steps + 1):
        batches = split_by_length(list(islice(examples, recipe.batch_size)))
        num_answer_tokens = sum(batch.num_answer_tokens for batch in batches)
        optimizer.zero_grad()
        loss = 0.0
        for batch in batches:
            part = summed_loss(model, batch) / num_answer_tokens
            torch.autograd.backward(part)
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss)
        if on_step is not None:
            on_step(step, loss, sum(batch.input_ids.numel() for batch in batches))
    return losses
