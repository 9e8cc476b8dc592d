"""The input of one forward pass."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kernels.adapters import AdapterTables, Segments
from kernels.paged_attention.libraries import HostIndices


@dataclass(frozen=True, slots=True)
class Feed:
    """Tokens of a batch that the step before has drawn: only the device knows them."""

    # [num_fed] int64, places in `ForwardBatch.token_ids`
    rows: Tensor
    # [num_fed] int64
    token_ids: Tensor

    def into(self, token_ids: Tensor) -> Tensor:
        """A copy of `token_ids [num_tokens]` with these in their places."""
        return token_ids.index_copy(0, self.rows, self.token_ids)


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """Tokens of several sequences, decodes and prefill chunks mixed, with everything that a decoder reads or writes.

    The tokens of a sequence are contiguous and in order of position; the tokens of an adapter are contiguous too.
    """

    # [num_tokens] int64
    token_ids: Tensor
    # [num_tokens] int64, from 0
    positions: Tensor
    # [num_tokens] int64, page * page_size + offset: where this token's key and value go
    slot_mapping: Tensor
    # [num_sequences, max_pages] int32; entries behind a sequence's last page are never read
    page_table: Tensor
    # [num_sequences + 1] int32, from 0 to num_tokens
    query_start: Tensor
    # [num_sequences] int32, tokens including those of this step
    context_lens: Tensor
    # [num_logits] int64, the tokens whose logits are wanted
    logit_rows: Tensor
    segments: Segments
    # None = base model only: no token has an adapter
    adapters: AdapterTables | None
    # [num_pages, num_layers, 2, page_size, num_kv_heads, head_dim], any strides; 0 = key, 1 = value
    kv_pages: Tensor
    # no sequence has more than one token
    decode_only: bool = False
    # None = every token is in `token_ids`
    feed: Feed | None = None
    # the same indices on the CPU, where they were uploaded from there; attention libraries plan with them
    host: HostIndices | None = None

    def fed_token_ids(self) -> Tensor:
        """`token_ids` with those of `feed`."""
        return self.token_ids if self.feed is None else self.feed.into(self.token_ids)


class Forward(Protocol):
    """What runs a batch: a decoder, or what stands before one on a GPU."""

    @property
    def dtype(self) -> torch.dtype: ...

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Logits `[num_logits, vocab]` float32."""
