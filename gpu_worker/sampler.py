"""The next token, as a pure function of (logits, params, tokens so far, seed, position).

The order is that of transformers' logits processors: repetition penalty, presence and frequency penalties, stop tokens
of an output that is too short, biases, temperature, top-k, top-p, min-p; then one draw. No row looks at another: the
same request draws the same tokens alone or in a crowd.
"""

from collections import Counter
from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
import torch

from gpu_worker.sequence import SamplingParams, Sequence, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Draw:
    """The token drawn for one row, and its log-probabilities when they were asked for.

    The token means nothing when the row was not `finite`: a logit was NaN, or the largest was infinite.
    """

    token_id: int
    logprobs: TokenLogprobs | None = None
    finite: bool = True


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing else: counter-based Philox4x64 (Salmon et al., SC 2011).

    The same (seed, position) draws the same token alone or in a crowd, resumed or not.
    """
    return float(np.random.Generator(np.random.Philox(key=seed, counter=position)).random())


def sample(logits: torch.Tensor, sequences: Items[Sequence]) -> list[Draw]:
    """One draw a row of `logits [num_rows, vocab_size]`, row i for the next token of `sequences[i]`.

    Temperature 0 takes the largest adjusted logit, the lowest id on a tie.
    """
    adjusted = _adjust(logits, sequences)
    tokens = adjusted.argmax(dim=-1)
    # NaN counts as the largest.
    finite = adjusted.gather(1, tokens.unsqueeze(1)).squeeze(1).isfinite().tolist()
    plain = [row for row, sequence in enumerate(sequences) if _draws(sequence) and not _filters(sequence.sampling)]
    filtered = [row for row, sequence in enumerate(sequences) if _draws(sequence) and _filters(sequence.sampling)]
    if plain:
        tokens[plain] = _draw(torch.softmax(_scaled(adjusted, sequences, plain), dim=-1), sequences, plain)
    if filtered:
        params = [sequences[row].sampling for row in filtered]
        probabilities, order = filtered_probabilities(_scaled(adjusted, sequences, filtered), params)
        places = _draw(probabilities, sequences, filtered)
        tokens[filtered] = order.gather(1, places.unsqueeze(1)).squeeze(1)
    ids = [int(token) for token in tokens.tolist()]
    wanted = [row for row, sequence in enumerate(sequences) if sequence.sampling.logprobs is not None]
    counts = [sequences[row].sampling.logprobs or 0 for row in wanted]
    described = dict(zip(wanted, token_logprobs(logits[wanted], [ids[row] for row in wanted], counts), strict=True))
    return [Draw(token_id, described.get(row), finite[row]) for row, token_id in enumerate(ids)]


def token_logprobs(logits: torch.Tensor, token_ids: Items[int], top_counts: Items[int]) -> list[TokenLogprobs]:
    """Log-probabilities of `token_ids[i]` and of the `top_counts[i]` most likely tokens in row i of `logits`."""
    if not token_ids:
        return []
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    chosen = logprobs.gather(1, torch.tensor(token_ids, device=logits.device).unsqueeze(1)).squeeze(1).tolist()
    values, indices = logprobs.topk(min(max(top_counts), logprobs.shape[-1]), dim=-1)
    rows = zip(token_ids, chosen, indices.tolist(), values.tolist(), top_counts, strict=True)
    return [
        TokenLogprobs(token_id, logprob, tuple(zip(ids[:count], tops[:count], strict=True)))
        for token_id, logprob, ids, tops, count in rows
    ]


def filtered_probabilities(scaled: torch.Tensor, params: Items[SamplingParams]) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities after top-k, top-p and min-p, in falling order, and the token id of each place.

    `scaled [num_rows, vocab_size]` are logits over temperature. Top-k keeps ties with its last token; top-p keeps the
    smallest set that reaches it within what top-k left; min-p is relative to the most likely token.
    """
    vocab_size, device = scaled.shape[-1], scaled.device
    ordered, order = torch.sort(scaled, dim=-1, descending=True, stable=True)
    top_k = torch.tensor([[param.top_k or vocab_size] for param in params], device=device).clamp(max=vocab_size)
    top_p = torch.tensor([[param.top_p] for param in params], dtype=torch.float64, device=device)
    min_p = torch.tensor([[param.min_p] for param in params], dtype=torch.float64, device=device)
    kept = ordered >= ordered.gather(1, top_k - 1)
    probabilities = torch.softmax(ordered.masked_fill(~kept, float("-inf")), dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    # 1.0 is off: rounding must not cut the tail.
    kept &= (before < top_p) | (top_p == 1.0)
    kept &= probabilities >= min_p * probabilities[:, :1]
    return torch.softmax(ordered.masked_fill(~kept, float("-inf")), dim=-1), order


def _draws(sequence: Sequence) -> bool:
    return sequence.sampling.temperature > 0


def _filters(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def _scaled(adjusted: torch.Tensor, sequences: Items[Sequence], rows: list[int]) -> torch.Tensor:
    temperatures = [[sequences[row].sampling.temperature] for row in rows]
    return adjusted[rows].double() / torch.tensor(temperatures, dtype=torch.float64, device=adjusted.device)


def _draw(probabilities: torch.Tensor, sequences: Items[Sequence], rows: list[int]) -> torch.Tensor:
    """The inverse of each row's cumulative distribution at one uniform number."""
    draws = [[uniform(sequences[row].sampling.seed, sequences[row].num_tokens)] for row in rows]
    cumulative = probabilities.cumsum(dim=-1)
    # The sum of rounded probabilities is not 1 exactly: scale the draw instead of every probability.
    thresholds = torch.tensor(draws, dtype=torch.float64, device=probabilities.device) * cumulative[:, -1:]
    places = torch.searchsorted(cumulative, thresholds, right=True).squeeze(1)
    # A draw just below 1 may round up to the whole sum; the last possible token is the one with any probability.
    last = (probabilities > 0).long().cumsum(dim=-1).argmax(dim=-1)
    return torch.minimum(places, last)


def _must_go_on(sequence: Sequence) -> bool:
    """Too short to stop: no stop token may be drawn."""
    return len(sequence.output_token_ids) < sequence.stopping.min_tokens and bool(sequence.stopping.stop_token_ids)


def _adjust(logits: torch.Tensor, sequences: Items[Sequence]) -> torch.Tensor:
    """Penalties and biases, on a copy when any row has some."""
    rows = [row for row, sequence in enumerate(sequences) if sequence.sampling.adjusts or _must_go_on(sequence)]
    if not rows:
        return logits
    adjusted = logits.clone()
    for row in rows:
        _adjust_row(adjusted[row], sequences[row])
    return adjusted


def _adjust_row(row: torch.Tensor, sequence: Sequence) -> None:
    params, device = sequence.sampling, row.device
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*sequence.prompt_token_ids, *sequence.output_token_ids}), device=device)
        scores = row[seen]
        row[seen] = torch.where(scores < 0, scores * params.repetition_penalty, scores / params.repetition_penalty)
    if sequence.output_token_ids and (params.presence_penalty or params.frequency_penalty):
        counts = Counter(sequence.output_token_ids)
        penalties = [params.presence_penalty + params.frequency_penalty * count for count in counts.values()]
        row[torch.tensor(list(counts), device=device)] -= torch.tensor(penalties, dtype=row.dtype, device=device)
    if _must_go_on(sequence):
        row[torch.tensor(sorted(sequence.stopping.stop_token_ids), device=device)] = float("-inf")
    if params.logit_bias:
        ids, biases = zip(*params.logit_bias, strict=True)
        row[torch.tensor(ids, device=device)] += torch.tensor(biases, dtype=row.dtype, device=device)
