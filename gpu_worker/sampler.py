"""The next token, as a pure function of (logits, params, seed, position)."""

from collections.abc import Sequence

import numpy as np
import torch

from gpu_worker.sequence import SamplingParams


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing else: counter-based Philox4x64 (Salmon et al., SC 2011).

    The same (seed, position) draws the same token alone or in a crowd, resumed or not.
    """
    return float(np.random.Generator(np.random.Philox(key=seed, counter=position)).random())


def sample(logits: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> list[int]:
    """Token ids, one a row of `logits [num_rows, vocab_size]`; `positions` are those of the tokens being drawn.

    Temperature 0 takes the largest logit, the lowest id on a tie. Otherwise the inverse of the cumulative distribution
    at one uniform draw.
    """
    tokens = logits.argmax(dim=-1)
    rows = [row for row, param in enumerate(params) if param.temperature > 0]
    if rows:
        temperatures = torch.tensor([[params[row].temperature] for row in rows], dtype=torch.float64)
        draws = torch.tensor([[uniform(params[row].seed, positions[row])] for row in rows], dtype=torch.float64)
        scaled = logits[rows].double() / temperatures.to(logits.device)
        cumulative = torch.softmax(scaled, dim=-1).cumsum(dim=-1)
        # The sum of rounded probabilities is not 1 exactly: scale the draw instead of every probability.
        thresholds = draws.to(logits.device) * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, thresholds, right=True).squeeze(1)
        tokens[rows] = drawn.clamp(max=logits.shape[-1] - 1)
    return [int(token) for token in tokens.tolist()]
