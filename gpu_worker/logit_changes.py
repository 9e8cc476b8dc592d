"""Penalties, biases and stop tokens that may not come yet: what happens to a row of logits before its temperature.

The host knows a sequence's tokens but for the one that the step in flight draws; that one is counted on the device. So
the tables are built without it, and a step waits for no token.
"""

from collections import Counter
from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gpu_worker.sequence import Sequence
from gpu_worker.transfer import padded, upload


@dataclass(frozen=True, slots=True)
class LogitChanges:
    """Of the rows that change, in the order of `rows`. A column of ids is padded with the id behind the vocabulary."""

    # [num_changed] int64, rows of the logits
    rows: npt.NDArray[np.int64]
    # [num_changed, num_seen] int64, tokens seen, each once; and how often each was generated, float64
    seen: npt.NDArray[np.int64]
    generated: npt.NDArray[np.float64]
    # [num_changed, 1] float32; presence and frequency float64
    repetition: npt.NDArray[np.float32]
    presence: npt.NDArray[np.float64]
    frequency: npt.NDArray[np.float64]
    # [num_changed, num_stops] int64
    stops: npt.NDArray[np.int64]
    # [num_changed, num_biased] int64 and float32
    biased: npt.NDArray[np.int64]
    biases: npt.NDArray[np.float32]

    def apply(self, logits: Tensor, pending: Tensor | None) -> Tensor:
        """A changed copy of `logits [num_rows, vocab]`. `pending [num_rows, 1]`: a generated token that the tables
        lack, or the id behind the vocabulary; None = they lack none."""
        device, vocab_size = logits.device, logits.shape[1]
        rows = upload(self.rows, device)
        # The column behind the vocabulary takes what padding writes.
        wide = torch.nn.functional.pad(logits.index_select(0, rows), (0, 1))
        seen, generated = upload(self.seen, device), upload(self.generated, device)
        if pending is not None:
            seen, generated = _counted(seen, generated, pending.index_select(0, rows), vocab_size)
        scores = wide.gather(1, seen)
        repetition = upload(self.repetition, device)
        scores = torch.where(scores < 0, scores * repetition, scores / repetition)
        penalties = upload(self.presence, device) + upload(self.frequency, device) * generated
        wide.scatter_(1, seen, scores - torch.where(generated > 0, penalties, 0.0).to(scores.dtype))
        wide.scatter_(1, upload(self.stops, device), float("-inf"))
        biased = upload(self.biased, device)
        wide.scatter_(1, biased, wide.gather(1, biased) + upload(self.biases, device))
        return logits.index_copy(0, rows, wide[:, :vocab_size])


def _counted(seen: Tensor, generated: Tensor, pending: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """The tables with `pending [num_changed, 1]` generated once more."""
    known = seen == pending
    again = known & (pending < vocab_size)
    new = torch.where(known.any(dim=1, keepdim=True), vocab_size, pending)
    return torch.cat((seen, new), dim=1), torch.cat((generated + again, (new < vocab_size).to(generated.dtype)), dim=1)


def changes(sequences: Items[Sequence], vocab_size: int) -> LogitChanges | None:
    """Of the next tokens of `sequences`; None when no row changes."""
    rows = [row for row, sequence in enumerate(sequences) if sequence.sampling.adjusts or _must_go_on(sequence)]
    if not rows:
        return None
    changed = [sequences[row] for row in rows]
    params = [sequence.sampling for sequence in changed]
    counts = [_seen(sequence) for sequence in changed]
    seen = padded([list(count) for count in counts], vocab_size, 1)
    biases = padded([[]] * len(rows), 0, max(len(param.logit_bias) for param in params)).astype(np.float32)
    for index, param in enumerate(params):
        biases[index, : len(param.logit_bias)] = [bias for _, bias in param.logit_bias]
    return LogitChanges(
        rows=np.array(rows, np.int64),
        seen=seen,
        generated=padded([list(count.values()) for count in counts], 0, 1).astype(np.float64),
        repetition=np.array([[param.repetition_penalty] for param in params], np.float32),
        presence=np.array([[param.presence_penalty] for param in params], np.float64),
        frequency=np.array([[param.frequency_penalty] for param in params], np.float64),
        stops=padded([sorted(seq.stopping.stop_token_ids) if _must_go_on(seq) else [] for seq in changed], vocab_size),
        biased=padded([[token for token, _ in param.logit_bias] for param in params], vocab_size),
        biases=biases,
    )


def _must_go_on(sequence: Sequence) -> bool:
    """Too short to stop: no stop token may be drawn."""
    return sequence.num_output_tokens < sequence.stopping.min_tokens and bool(sequence.stopping.stop_token_ids)


def _seen(sequence: Sequence) -> Counter[int]:
    """Known tokens that a penalty falls on -> how often each was generated; 0 = in the prompt only."""
    params = sequence.sampling
    if params.repetition_penalty == 1.0 and not (params.presence_penalty or params.frequency_penalty):
        return Counter()
    counts = Counter(sequence.output_token_ids)
    if params.repetition_penalty != 1.0:
        counts.update(dict.fromkeys(sequence.prompt_token_ids, 0))
    return counts
