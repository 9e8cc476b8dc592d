"""The next token, as a pure function of (logits, params, tokens so far, seed, position).

The order is that of transformers' logits processors: repetition penalty, presence and frequency penalties, stop tokens
of an output that is too short, biases, temperature, top-k, top-p, min-p; then one draw. No row looks at another: the
same request draws the same tokens alone or in a crowd.

`plan` reads the sequences, on the host; `SamplingPlan.draw` needs the logits and waits for nothing, so that the tokens
of a step on a GPU are inputs of the next one before the host has seen them.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gpu_worker.logit_changes import LogitChanges, changes
from gpu_worker.sequence import SamplingParams, Sequence
from gpu_worker.transfer import on_host, upload

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Drawn:
    """One token a row. It means nothing where the row was not finite: a logit was NaN, or the largest was infinite."""

    # [num_rows] int64 and bool
    token_ids: Tensor
    finite: Tensor


@dataclass(frozen=True, slots=True)
class RandomRows:
    """Rows that are drawn at random; those that nothing filters, or those that something does."""

    # [num_random] int64, rows of the logits
    rows: npt.NDArray[np.int64]
    # A column each; `uniform` is one number of [0, 1) a row.
    temperature: Floats
    uniform: Floats
    filters: "Filters | None"

    def draw(self, adjusted: Tensor) -> Tensor:
        """`[num_random]` token ids, from all rows of logits."""
        device = adjusted.device
        scaled = adjusted.index_select(0, upload(self.rows, device)).double() / upload(self.temperature, device)
        draws = upload(self.uniform, device)
        if self.filters is None:
            return _inverse(torch.softmax(scaled, dim=-1), draws)
        probabilities, order = self.filters.apply(scaled)
        return order.gather(1, _inverse(probabilities, draws).unsqueeze(1)).squeeze(1)


@dataclass(frozen=True, slots=True)
class Filters:
    """`[num_rows, 1]` each; top_k is at most the vocabulary's size."""

    top_k: npt.NDArray[np.int64]
    top_p: Floats
    min_p: Floats

    @classmethod
    def of(cls, params: Items[SamplingParams], vocab_size: int) -> "Filters":
        return cls(
            np.array([[min(param.top_k or vocab_size, vocab_size)] for param in params], np.int64),
            np.array([[param.top_p] for param in params], np.float64),
            np.array([[param.min_p] for param in params], np.float64),
        )

    def apply(self, scaled: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities after top-k, top-p and min-p, in falling order, and the token id of each place.

        `scaled [num_rows, vocab_size]` are logits over temperature. Top-k keeps ties with its last token; top-p keeps
        the smallest set that reaches it within what top-k left; min-p is relative to the most likely token.
        """
        top_k, top_p, min_p = (upload(array, scaled.device) for array in (self.top_k, self.top_p, self.min_p))
        ordered, order = torch.sort(scaled, dim=-1, descending=True, stable=True)
        kept = ordered >= ordered.gather(1, top_k - 1)
        probabilities = torch.softmax(ordered.masked_fill(~kept, float("-inf")), dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        # 1.0 is off: rounding must not cut the tail.
        kept &= (before < top_p) | (top_p == 1.0)
        kept &= probabilities >= min_p * probabilities[:, :1]
        return torch.softmax(ordered.masked_fill(~kept, float("-inf")), dim=-1), order


@dataclass(frozen=True, slots=True)
class SamplingPlan:
    """How each row of a step's logits becomes a token. Temperature 0 takes the largest adjusted logit, the lowest id
    on a tie."""

    changes: LogitChanges | None
    random: tuple[RandomRows, ...]

    def draw(self, logits: Tensor, pending: Tensor | None = None) -> Drawn:
        """Tokens of `logits [num_rows, vocab_size]`. `pending [num_rows, 1]` are tokens that the step before drew and
        the plan does not know, the id behind the vocabulary where there is none."""
        adjusted = logits if self.changes is None else self.changes.apply(logits, pending)
        tokens, finite = _largest(adjusted)
        for part in self.random:
            tokens.index_copy_(0, upload(part.rows, logits.device), part.draw(adjusted))
        return Drawn(tokens, finite)


def plan(sequences: Items[Sequence], vocab_size: int) -> SamplingPlan:
    """For logits whose row i is for the next token of `sequences[i]`."""
    drawn = [row for row, sequence in enumerate(sequences) if sequence.sampling.temperature > 0]
    plain = [row for row in drawn if not _filters(sequences[row].sampling)]
    filtered = [row for row in drawn if _filters(sequences[row].sampling)]
    parts = tuple(_random(sequences, rows, vocab_size) for rows in (plain, filtered) if rows)
    return SamplingPlan(changes(sequences, vocab_size), parts)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing else: counter-based Philox4x64 (Salmon et al., SC 2011).

    The same (seed, position) draws the same token alone or in a crowd, resumed or not.
    """
    return float(np.random.Generator(np.random.Philox(key=seed, counter=position)).random())


def _largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """`[num_rows]` each: the first place of each row's largest logit, NaN counting as the largest; is it finite?"""
    if on_host(logits):
        # torch wakes its threads for it, which takes ten times as long as numpy needs
        rows = logits.numpy()
        places = rows.argmax(axis=1)
        return torch.from_numpy(places), torch.from_numpy(np.isfinite(rows[np.arange(len(rows)), places]))
    tokens = logits.argmax(dim=-1)
    return tokens, logits.gather(1, tokens.unsqueeze(1)).squeeze(1).isfinite()


def _filters(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def _random(sequences: Items[Sequence], rows: Items[int], vocab_size: int) -> RandomRows:
    """Of rows that all have filters, or all none."""
    params = [sequences[row].sampling for row in rows]
    return RandomRows(
        np.array(rows, np.int64),
        np.array([[param.temperature] for param in params], np.float64),
        np.array([[uniform(sequences[row].sampling.seed, sequences[row].num_tokens)] for row in rows], np.float64),
        Filters.of(params, vocab_size) if _filters(params[0]) else None,
    )


def _inverse(probabilities: Tensor, draws: Tensor) -> Tensor:
    """The inverse of each row's cumulative distribution at one uniform number; `draws [num_rows, 1]`."""
    cumulative = probabilities.cumsum(dim=-1)
    # The sum of rounded probabilities is not 1 exactly: scale the draw instead of every probability.
    places = torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True).squeeze(1)
    # A draw just below 1 may round up to the whole sum; the last possible token is the one with any probability.
    last = (probabilities > 0).long().cumsum(dim=-1).argmax(dim=-1)
    return torch.minimum(places, last)
