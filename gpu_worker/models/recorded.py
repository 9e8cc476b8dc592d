"""The decoder recorded: what Python does for each operation is done once and not in every step."""

from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor

from gpu_worker.batch import ForwardBatch
from gpu_worker.models.decoder import Decoder
from gpu_worker.models.weights import DecoderWeights
from kernels import dispatch
from kernels.adapters import Segments
from kernels.cpu import tables
from kernels.cpu.launch import NotRecordableError, written_down
from kernels.cpu.recording import Recording, Take

# Tokens, rows of logits, sequences, pages of a sequence and segments of the stand-in batches: no two pairs are alike.
_SIZES = (2, 11, 3, 5, 7), (3, 13, 5, 7, 11)
# Places of the first two among the values.
_COUNTS = 0, 1


class RecordedDecoder:
    """Runs batches as `decoder` does, to the bit; what cannot be recorded is left to it. For one thread at a time."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        # By the largest rank of the batch's adapters, 0 without any; None = cannot be recorded.
        self._recordings: dict[int, tuple[Recording, Counter[tuple[str, str]]] | None] = {}
        # What the constants in them point to.
        self._constants: tuple[DecoderWeights, Tensor] | None = None
        self._arena = torch.empty(0, dtype=torch.uint8)

    @property
    def dtype(self) -> torch.dtype:
        return self._decoder.dtype

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Logits `[num_logits, vocab]` float32 of the batch's `logit_rows`; writes this step's keys and values."""
        recorded = self._recorded(batch) if dispatch.available() else None
        if recorded is None:
            return self._decoder.forward(batch)
        recording, calls = recorded
        token_ids = batch.fed_token_ids()
        (logits,) = recording.run(_values(token_ids, batch), self._rooms(recording, batch))
        dispatch.calls.update(calls)
        return logits

    def _rooms(self, recording: Recording, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        """One that is kept, and one that the logits keep as long as somebody wants them."""
        token_bytes, logit_bytes = recording.row_bytes
        num_bytes = len(batch.token_ids) * token_bytes
        if self._arena.nbytes < num_bytes:
            self._arena = torch.empty(num_bytes, dtype=torch.uint8)
        return self._arena, torch.empty(len(batch.logit_rows) * logit_bytes, dtype=torch.uint8)

    def _recorded(self, batch: ForwardBatch) -> tuple[Recording, Counter[tuple[str, str]]] | None:
        known = self._constants
        if known is None or known[0] is not self._decoder.weights or known[1] is not batch.kv_pages:
            self._recordings.clear()
            self._constants = self._decoder.weights, batch.kv_pages
        lora_rank = 0 if batch.adapters is None else batch.adapters.max_lora_rank
        if lora_rank not in self._recordings:
            self._recordings[lora_rank] = self._record(batch)
        return self._recordings[lora_rank]

    def _record(self, batch: ForwardBatch) -> tuple[Recording, Counter[tuple[str, str]]] | None:
        before = dispatch.calls.copy()
        try:
            one = self._take(batch, *_SIZES[0])
            calls = dispatch.calls - before
            return Recording(one, self._take(batch, *_SIZES[1])), calls
        except NotRecordableError:
            return None
        finally:
            dispatch.calls.subtract(dispatch.calls - before)

    def _take(self, batch: ForwardBatch, tokens: int, logits: int, sequences: int, pages: int, segments: int) -> Take:
        """What the decoder does with a batch of such sizes and of the constants of `batch`."""
        stand_in = replace(
            batch,
            token_ids=batch.token_ids.new_empty(tokens),
            logit_rows=batch.logit_rows.new_empty(logits),
            positions=batch.positions.new_empty(tokens),
            slot_mapping=batch.slot_mapping.new_empty(tokens),
            page_table=batch.page_table.new_empty(sequences, pages),
            query_start=batch.query_start.new_empty(sequences + 1),
            context_lens=batch.context_lens.new_empty(sequences),
            segments=Segments(
                batch.segments.starts.new_empty(segments + 1), batch.segments.adapter.new_empty(segments)
            ),
            # another object has another structure
            adapters=None if batch.adapters is None else replace(batch.adapters),
        )
        with written_down() as operations:
            found = self._decoder.operations(stand_in.token_ids, stand_in)
        return Take(operations, _values(stand_in.token_ids, stand_in), _COUNTS, (found,))


def _values(token_ids: Tensor, batch: ForwardBatch) -> tuple[int, ...]:
    """What an operation may be told of a batch whose tokens are `token_ids` and is not the same for all."""
    sizes = len(token_ids), len(batch.logit_rows), *batch.page_table.shape
    slots = batch.slot_mapping, batch.page_table, batch.query_start, batch.context_lens
    indices = token_ids, batch.logit_rows, batch.positions, *slots
    values = (*sizes, *(tensor.data_ptr() for tensor in indices))
    if batch.adapters is None:
        return values
    segments = batch.segments
    runs = len(segments.adapter), segments.starts.data_ptr(), segments.adapter.data_ptr()
    return (*values, tables.address(batch.adapters), *runs)
