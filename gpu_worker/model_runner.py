"""From a step plan to tokens: builds the forward batch once with numpy, runs the decoder, samples."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from gpu_worker.batch import Forward, ForwardBatch
from gpu_worker.batching import Chunk
from gpu_worker.memory.adapter_cache import ResidentAdapter
from gpu_worker.memory.manager import MemoryManager
from gpu_worker.memory.pool import PagePool
from gpu_worker.sampler import Draw, sample, token_logprobs
from gpu_worker.sequence import TokenLogprobs
from kernels import dispatch
from kernels.adapters import ADAPTER_DTYPES, AdapterTables, Segments

_DTYPE_CODES = {str(dtype).removeprefix("torch."): code for code, dtype in enumerate(ADAPTER_DTYPES)}


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Tokens drawn in a step and the seconds its phases took."""

    # sequence id -> token
    draws: dict[str, Draw]
    # sequence id -> log-probabilities of the prompt tokens that this step's prompt chunk predicts
    prompt_logprobs: dict[str, list[TokenLogprobs]]
    # the base model counts as one
    distinct_adapters: int
    # largest rank of each adapter in the batch
    lora_ranks: list[int]
    # operations of the forward pass, by the backend that ran them
    backend_calls: dict[str, int]
    forward_seconds: float
    sample_seconds: float


class ModelRunner:
    """Runs one batch at a time; `device` is where `model` wants the indices of a batch."""

    def __init__(self, model: Forward, memory: MemoryManager, pool: PagePool, device: str) -> None:
        self._model = model
        self._memory = memory
        self._pool = pool
        self._device = device
        self._kv_pages = pool.kv_pages(model.dtype)
        # The last batch's tables; consecutive steps mostly run the same adapters.
        self._tables_key: tuple[int, ...] = ()
        self._tables: AdapterTables | None = None
        # The largest rank of each of its adapters.
        self._lora_ranks: list[int] = []

    def run(self, chunks: Sequence[Chunk], step: int) -> StepOutput:
        """Computes `chunks`, writes their KV, and draws a token for each chunk that ends its sequence."""
        started = time.perf_counter()
        versions = sorted({chunk.sequence.adapter_version for chunk in chunks})
        # Tokens of one adapter are one segment: each distinct adapter is read once.
        ordered = sorted(chunks, key=lambda chunk: chunk.sequence.adapter_version)
        adapters = [self._resident(version, step) for version in versions if version]
        batch = self._build(ordered, versions, adapters)
        before = dispatch.calls_by_backend()
        with torch.inference_mode():
            logits = self._model.forward(batch)
            forwarded = time.perf_counter()
            draws, prompt_logprobs = self._read(logits, ordered)
        return StepOutput(
            draws,
            prompt_logprobs,
            distinct_adapters=len(versions),
            lora_ranks=self._lora_ranks if adapters else [],
            backend_calls={name: calls - before[name] for name, calls in dispatch.calls_by_backend().items()},
            forward_seconds=forwarded - started,
            sample_seconds=time.perf_counter() - forwarded,
        )

    def _resident(self, adapter_version: str, step: int) -> ResidentAdapter:
        self._memory.adapters.touch(adapter_version, step)
        adapter = self._memory.adapters.get(adapter_version)
        if adapter is None or adapter.loading:
            raise AssertionError(f"adapter {adapter_version} is in a batch but not in pages")
        return adapter

    def _read(
        self, logits: torch.Tensor, chunks: Sequence[Chunk]
    ) -> tuple[dict[str, Draw], dict[str, list[TokenLogprobs]]]:
        """Draws tokens and describes prompt tokens; `logits` has the rows of `_logit_offsets`, chunk after chunk."""
        sampled, rows, described, row = [], [], {}, 0
        for chunk in chunks:
            offsets = _logit_offsets(chunk)
            if predicted := _predicted_prompt(chunk):
                counts = [chunk.sequence.sampling.prompt_logprobs or 0] * len(predicted)
                part = logits[row : row + len(predicted)]
                described[chunk.sequence.sequence_id] = token_logprobs(part, predicted, counts)
            row += len(offsets)
            if chunk.samples:
                sampled.append(chunk.sequence)
                rows.append(row - 1)
        if not sampled:
            return {}, described
        draws = sample(logits[rows] if described else logits, sampled)
        return {sequence.sequence_id: draw for sequence, draw in zip(sampled, draws, strict=True)}, described

    def _build(self, chunks: Sequence[Chunk], versions: list[str], adapters: list[ResidentAdapter]) -> ForwardBatch:
        page_size = self._memory.geometry.page_size
        lengths = np.array([chunk.length for chunk in chunks], np.int64)
        query_start = np.concatenate([[0], np.cumsum(lengths)])
        context_lens = np.array([chunk.start + chunk.length for chunk in chunks], np.int32)
        page_table = _ragged([self._memory.kv.page_table(chunk.sequence.sequence_id) for chunk in chunks])
        starts = np.array([chunk.start for chunk in chunks], np.int64)
        token_ids = np.concatenate([_token_ids(chunk) for chunk in chunks])
        # position of a token = its place in the batch - where its chunk starts there + where its chunk starts
        positions = np.arange(query_start[-1]) + np.repeat(starts - query_start[:-1], lengths)
        sequence_of_token = np.repeat(np.arange(len(chunks)), lengths)
        pages = page_table[sequence_of_token, positions // page_size].astype(np.int64)
        logit_rows = [query_start[row] + offset for row, chunk in enumerate(chunks) for offset in _logit_offsets(chunk)]
        return ForwardBatch(
            token_ids=self._to_device(token_ids),
            positions=self._to_device(positions),
            slot_mapping=self._to_device(pages * page_size + positions % page_size),
            page_table=self._to_device(page_table),
            query_start=self._to_device(query_start.astype(np.int32)),
            context_lens=self._to_device(context_lens),
            logit_rows=self._to_device(np.array(logit_rows, np.int64)),
            segments=self._segments(chunks, lengths, versions),
            adapters=self._adapter_tables(adapters),
            kv_pages=self._kv_pages,
            decode_only=int(lengths.max()) == 1,
        )

    def _segments(self, chunks: Sequence[Chunk], lengths: npt.NDArray[np.int64], versions: list[str]) -> Segments:
        tokens = dict.fromkeys(versions, 0)
        for chunk, length in zip(chunks, lengths.tolist(), strict=True):
            tokens[chunk.sequence.adapter_version] += length
        starts = np.concatenate([[0], np.cumsum(list(tokens.values()))]).astype(np.int32)
        # The base model sorts first: it has no row in the tables.
        first = 0 if versions[0] else -1
        rows = np.arange(first, first + len(versions), dtype=np.int32)
        return Segments(starts=self._to_device(starts), adapter=self._to_device(rows))

    def _adapter_tables(self, adapters: list[ResidentAdapter]) -> AdapterTables | None:
        if not adapters:
            return None
        key = tuple(adapter.load_id for adapter in adapters)
        if key != self._tables_key or self._tables is None:
            lora_rank = np.stack([adapter.table.lora_rank for adapter in adapters])
            self._lora_ranks = [int(largest) for largest in lora_rank.max(axis=(1, 2))]
            dtypes = np.array([_DTYPE_CODES[adapter.layout.dtype] for adapter in adapters], np.int32)
            self._tables = AdapterTables(
                pool=self._pool.bytes,
                page_table=self._to_device(_ragged([adapter.pages for adapter in adapters])),
                start_unit=self._to_device(np.stack([adapter.table.start_unit for adapter in adapters])),
                lora_rank=self._to_device(lora_rank),
                scaling=self._to_device(np.stack([adapter.table.scaling for adapter in adapters])),
                dtype=self._to_device(dtypes),
                max_lora_rank=int(lora_rank.max()),
            )
            self._tables_key = key
        return self._tables

    def _to_device(self, array: npt.NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)


def _predicted_prompt(chunk: Chunk) -> list[int]:
    """Prompt tokens whose log-probabilities the chunk yields and nobody has yet: each is predicted one before."""
    sequence = chunk.sequence
    if not sequence.wants_prompt_logprobs:
        return []
    first = 1 + len(sequence.prompt_logprobs)
    return sequence.prompt_token_ids[first : chunk.start + chunk.length + 1] if first > chunk.start else []


def _logit_offsets(chunk: Chunk) -> list[int]:
    """Tokens of the chunk whose logits are wanted: those that predict prompt tokens, then the one that samples."""
    first = len(chunk.sequence.prompt_logprobs) - chunk.start
    offsets = list(range(first, first + len(_predicted_prompt(chunk))))
    last = chunk.length - 1
    return [*offsets, last] if chunk.samples else offsets


def _token_ids(chunk: Chunk) -> npt.NDArray[np.int64]:
    return np.array(chunk.sequence.token_ids(chunk.start, chunk.start + chunk.length), np.int64)


def _ragged(rows: Sequence[Sequence[int]]) -> npt.NDArray[np.int32]:
    """`[len(rows), longest row]` int32; entries behind a row's end are 0 and never read."""
    table = np.zeros((len(rows), max(len(row) for row in rows)), np.int32)
    for index, row in enumerate(rows):
        table[index, : len(row)] = row
    return table
