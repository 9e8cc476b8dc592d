"""The smallest engine: keeps sequences in permuted KV pages and builds the batch of a step."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gpu_worker.batch import Forward, ForwardBatch
from gpu_worker.models import Decoder
from kernels.adapters import AdapterTables
from tests.kernels.adapter_pool import build_segments

PAGE_SIZE, PAGES_PER_SEQUENCE = 4, 16


@dataclass(slots=True)
class Running:
    """A sequence; `adapter` is a row of the tables, -1 = none."""

    tokens: list[int]
    adapter: int = -1
    num_computed: int = 0
    logits: list[Tensor] = field(default_factory=list)


class Stepper:
    def __init__(self, decoder: Decoder, sequences: Sequence[Running], adapters: AdapterTables | None = None) -> None:
        sizes, num_pages = decoder.config.geometry, len(sequences) * PAGES_PER_SEQUENCE
        shape = num_pages, sizes.num_layers, 2, PAGE_SIZE, sizes.num_kv_heads, sizes.head_dim
        # whatever runs its batches
        self.decoder: Forward = decoder
        self.adapters = adapters
        # by adapter, so that the tokens of an adapter are contiguous in every step
        self.sequences = sorted(sequences, key=lambda sequence: sequence.adapter)
        self.kv_pages = torch.full(shape, torch.nan, dtype=decoder.dtype)
        pages = torch.randperm(num_pages, generator=torch.Generator().manual_seed(5))
        self.page_table = pages.view(len(sequences), PAGES_PER_SEQUENCE).to(torch.int32)

    def run(self, chunk_tokens: int) -> None:
        """Computes everything that is not computed, at most `chunk_tokens` of each sequence in a step."""
        while any(sequence.num_computed < len(sequence.tokens) for sequence in self.sequences):
            self.step([min(chunk_tokens, len(seq.tokens) - seq.num_computed) for seq in self.sequences])

    def step(self, lengths: list[int]) -> None:
        logits = self.decoder.forward(self.batch(lengths))
        for sequence, length, rows in zip(self.sequences, lengths, logits.split_with_sizes(lengths), strict=True):
            sequence.num_computed += length
            sequence.logits.append(rows)

    def batch(self, lengths: list[int], logit_rows: Tensor | None = None) -> ForwardBatch:
        """The next `lengths[i]` tokens of each sequence; all logits are wanted unless rows are given."""
        tokens, positions, slots = [], [], []
        for row, (sequence, length) in enumerate(zip(self.sequences, lengths, strict=True)):
            for position in range(sequence.num_computed, sequence.num_computed + length):
                tokens.append(sequence.tokens[position])
                positions.append(position)
                page = int(self.page_table[row, position // PAGE_SIZE])
                slots.append(page * PAGE_SIZE + position % PAGE_SIZE)
        tokens_of = {sequence.adapter: 0 for sequence in self.sequences}
        for sequence, length in zip(self.sequences, lengths, strict=True):
            tokens_of[sequence.adapter] += length
        contexts = [sequence.num_computed + length for sequence, length in zip(self.sequences, lengths, strict=True)]
        return ForwardBatch(
            token_ids=torch.tensor(tokens),
            positions=torch.tensor(positions),
            slot_mapping=torch.tensor(slots),
            page_table=self.page_table,
            query_start=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
            context_lens=torch.tensor(contexts, dtype=torch.int32),
            logit_rows=torch.arange(len(tokens)) if logit_rows is None else logit_rows,
            segments=build_segments(list(tokens_of.values()), list(tokens_of)),
            adapters=self.adapters,
            kv_pages=self.kv_pages,
        )
