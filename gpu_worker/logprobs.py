"""Log-probabilities of tokens under the model itself, computed where the logits are."""

from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor

from gpu_worker.sequence import TokenLogprobs


@dataclass(frozen=True, slots=True)
class Described:
    """Tokens with their log-probabilities, and the most likely ones beside each."""

    # [num_rows] int64
    token_ids: Tensor
    # [num_rows] float32
    chosen: Tensor
    # [num_rows, most alternatives] int64 and float32, the most likely first
    top_ids: Tensor
    top_logprobs: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.token_ids, self.chosen, self.top_ids, self.top_logprobs

    def read(self, top_counts: Items[int]) -> list[TokenLogprobs]:
        """Row i with `top_counts[i]` alternatives; the tensors must be on the host."""
        rows = zip(*(tensor.tolist() for tensor in self.tensors), top_counts, strict=True)
        return [
            TokenLogprobs(token_id, logprob, tuple(zip(ids[:count], tops[:count], strict=True)))
            for token_id, logprob, ids, tops, count in rows
        ]


def describe(logits: Tensor, token_ids: Tensor, most: int) -> Described:
    """Of `token_ids[i]`, and of the `most` most likely tokens, in row i of `logits`. Waits for nothing."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    chosen = logprobs.gather(1, token_ids.unsqueeze(1)).squeeze(1)
    values, indices = logprobs.topk(min(most, logprobs.shape[-1]), dim=-1)
    return Described(token_ids, chosen, indices, values)
