"""From a step plan to tokens: builds the forward batch once with numpy, runs the decoder, samples.

A step is launched, and its output is read later. On a GPU it runs meanwhile; the tokens that it draws stay there and
are inputs of the next step before anybody here has seen them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from gpu_worker.batch import Feed, Forward, ForwardBatch
from gpu_worker.batching import Chunk
from gpu_worker.logprobs import describe
from gpu_worker.memory.adapter_cache import ResidentAdapter
from gpu_worker.memory.manager import MemoryManager
from gpu_worker.memory.pool import PagePool
from gpu_worker.sampler import SamplingPlan, plan
from gpu_worker.step_output import Mark, StepOutput, StepTensors, Wanted
from gpu_worker.transfer import Download, upload
from kernels import dispatch
from kernels.adapters import ADAPTER_DTYPES, AdapterTables, Segments

_DTYPE_CODES = {str(dtype).removeprefix("torch."): code for code, dtype in enumerate(ADAPTER_DTYPES)}


@dataclass(frozen=True, slots=True)
class _Job:
    """A step, as far as it is known when it is launched."""

    batch: ForwardBatch
    wanted: Wanted
    sampling: SamplingPlan
    start: Mark
    # Places in the batch's tokens that hold a token of the step before, and its row there.
    fed_rows: npt.NDArray[np.int64]
    fed_from: npt.NDArray[np.int64]
    # [num_draws] row of the step before that draws a token of the same sequence, -1 = none
    pending_from: npt.NDArray[np.int64]


class Queue(Protocol):
    """Where steps run, one behind the other."""

    def __call__(self, job: Callable[[], StepTensors], /) -> Callable[[], StepTensors]:
        """Starts a job, or runs it; what it returns waits for the job's result."""


def at_once(job: Callable[[], StepTensors]) -> Callable[[], StepTensors]:
    """Runs the job here. On a GPU that is: launches it."""
    result = job()
    return lambda: result


class ModelRunner:
    """Launches one batch behind the other; `device` is where `model` wants the indices of a batch."""

    def __init__(
        self,
        model: Forward,
        memory: MemoryManager,
        pool: PagePool,
        device: str,
        vocab_size: int,
        queue: Queue = at_once,
    ) -> None:
        self._model = model
        self._memory = memory
        self._pool = pool
        self._device = device
        self._vocab_size = vocab_size
        self._queue = queue
        self._kv_pages = pool.kv_pages(model.dtype)
        # The last batch's tables; consecutive steps mostly run the same adapters.
        self._tables_key: tuple[int, ...] = ()
        self._tables: AdapterTables | None = None
        # The largest rank of each of its adapters.
        self._lora_ranks: list[int] = []
        # What the last launched step draws: rows by sequence id.
        self._rows: dict[str, int] = {}
        # The tokens that the last step drew, on the device; for the jobs.
        self._drawn: torch.Tensor | None = None

    def launch(self, chunks: Sequence[Chunk], step: int) -> Callable[[], StepOutput]:
        """Starts to compute `chunks`, which writes their KV and draws a token for each chunk that ends its sequence.

        The result waits for the step and reads its output; nothing else waits.
        """
        start = Mark(self._pool.bytes.device)
        versions = sorted({chunk.sequence.adapter_version for chunk in chunks})
        # Tokens of one adapter are one segment: each distinct adapter is read once.
        ordered = sorted(chunks, key=lambda chunk: chunk.sequence.adapter_version)
        adapters = [self._resident(version, step) for version in versions if version]
        job = self._job(ordered, self._build(ordered, versions, adapters), start)
        lora_ranks = self._lora_ranks if adapters else []
        result = self._queue(lambda: self._run(job))
        return lambda: result().read(len(versions), lora_ranks)

    def _resident(self, adapter_version: str, step: int) -> ResidentAdapter:
        self._memory.adapters.touch(adapter_version, step)
        adapter = self._memory.adapters.get(adapter_version)
        if adapter is None or adapter.loading:
            raise AssertionError(f"adapter {adapter_version} is in a batch but not in pages")
        return adapter

    def _job(self, chunks: list[Chunk], batch: ForwardBatch, start: Mark) -> _Job:
        drawing = [chunk.sequence for chunk in chunks if chunk.samples]
        fed_rows, fed_from, end = [], [], 0
        for chunk in chunks:
            end += chunk.length
            if chunk.ends_pending:
                fed_rows.append(end - 1)
                fed_from.append(self._rows[chunk.sequence.sequence_id])
        pending_from = [self._rows[seq.sequence_id] if seq.pending_tokens else -1 for seq in drawing]
        wanted = Wanted.of(chunks)
        self._rows = {sequence_id: row for row, sequence_id in enumerate(wanted.drawing)}
        indices = (np.array(places, np.int64) for places in (fed_rows, fed_from, pending_from))
        return _Job(batch, wanted, plan(drawing, self._vocab_size), start, *indices)

    def _run(self, job: _Job) -> StepTensors:
        """The forward pass and what is read from its logits; waits for nothing that is on a device."""
        wanted, before = job.wanted, dispatch.calls_by_backend()
        device, tensors = self._pool.bytes.device, list[torch.Tensor]()
        with torch.inference_mode():
            pending = self._pending(job, device)
            feed = self._feed(job, device)
            logits = self._model.forward(replace(job.batch, feed=feed) if feed else job.batch)
            forwarded = Mark(device)
            drawn_rows = logits
            if len(wanted.drawn_rows) < len(logits):
                drawn_rows = logits.index_select(0, upload(wanted.drawn_rows, device))
            if wanted.drawing:
                drawn = job.sampling.draw(drawn_rows, pending)
                self._drawn = drawn.token_ids
                tensors += [drawn.token_ids, drawn.finite]
            if wanted.top_counts:
                tensors += _describe(logits, wanted, self._drawn)
            marks = job.start, forwarded, Mark(device)
            download = Download(tensors)
        calls = {name: calls - before[name] for name, calls in dispatch.calls_by_backend().items()}
        return StepTensors(wanted, download, marks, calls)

    def _feed(self, job: _Job, device: torch.device) -> Feed | None:
        if not len(job.fed_rows) or self._drawn is None:
            return None
        return Feed(self._to_device(job.fed_rows), self._drawn.index_select(0, upload(job.fed_from, device)))

    def _pending(self, job: _Job, device: torch.device) -> torch.Tensor | None:
        """`[num_draws, 1]`: tokens of the step before that the plan of the draws does not know."""
        if job.sampling.changes is None or self._drawn is None or not (job.pending_from >= 0).any():
            return None
        sources = upload(job.pending_from, device)
        tokens = self._drawn.index_select(0, sources.clamp(min=0))
        return torch.where(sources >= 0, tokens, self._vocab_size).unsqueeze(1)

    def _build(self, chunks: Sequence[Chunk], versions: list[str], adapters: list[ResidentAdapter]) -> ForwardBatch:
        page_size = self._memory.geometry.page_size
        lengths = np.array([chunk.length for chunk in chunks], np.int64)
        query_start = np.concatenate([[0], np.cumsum(lengths)])
        context_lens = np.array([chunk.start + chunk.length for chunk in chunks], np.int32)
        page_table = _ragged([self._memory.kv.page_table(chunk.sequence.sequence_id) for chunk in chunks])
        starts = np.array([chunk.start for chunk in chunks], np.int64)
        token_ids = np.array([token for chunk in chunks for token in _token_ids(chunk)], np.int64)
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


def _describe(logits: torch.Tensor, wanted: Wanted, drawn: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """Prompt tokens first, then tokens of this step."""
    device = logits.device
    rows = [*wanted.prompt_rows, *wanted.drawn_rows[wanted.described_draws].tolist()]
    token_ids = upload(np.array(wanted.prompt_token_ids, np.int64), device)
    if wanted.described_draws and drawn is not None:
        draws = drawn.index_select(0, upload(np.array(wanted.described_draws, np.int64), device))
        token_ids = torch.cat((token_ids, draws))
    picked = logits.index_select(0, upload(np.array(rows, np.int64), device))
    return describe(picked, token_ids, max(wanted.top_counts)).tensors


def _logit_offsets(chunk: Chunk) -> list[int]:
    """Tokens of the chunk whose logits are wanted: those that predict prompt tokens, then the one that samples."""
    offsets = [place - 1 - chunk.start for place in chunk.described]
    return [*offsets, chunk.length - 1] if chunk.samples else offsets


def _token_ids(chunk: Chunk) -> list[int]:
    """Those that are known; a token that is not is 0."""
    known = chunk.sequence.token_ids(chunk.start, chunk.start + chunk.length)
    return [*known, 0] if chunk.ends_pending else known


def _ragged(rows: Sequence[Sequence[int]]) -> npt.NDArray[np.int32]:
    """`[len(rows), longest row]` int32; entries behind a row's end are 0 and never read."""
    table = np.zeros((len(rows), max(len(row) for row in rows)), np.int32)
    for index, row in enumerate(rows):
        table[index, : len(row)] = row
    return table
