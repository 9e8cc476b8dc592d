"""Runs forward batches on a GPU: decodes as captured graphs, everything else eagerly.

A batch arrives with its indices on the CPU, as the model runner builds them; weights, pages and logits are on the
device. Nothing here waits for the device.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gpu_worker.batch import ForwardBatch
from gpu_worker.cuda.graph_plan import GraphKey, GraphPlanner, StepFacts
from gpu_worker.cuda.static_batch import StaticBatch, StaticTables, uploaded, uploaded_tables, uploaded_tensor
from gpu_worker.models.decoder import Decoder
from kernels.adapters import AdapterTables

# Captures a function and returns what runs it again; the second gives the result, at one address for ever.
Replay = Callable[[], Tensor]
Capture = Callable[[Callable[[], Tensor]], Replay]


class CudaGraphs:
    """Captures on a stream of its own, into one memory pool that all graphs share."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> Replay:
        # Once before the capture: Triton compiles and cuBLAS allocates, which a capture may not contain.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may copy adapters meanwhile: only this thread's calls belong to the capture.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = run()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


def call_again(run: Callable[[], Tensor]) -> Replay:
    """In place of graphs, where there are none."""
    run()
    return run


class Executor:
    """A model with its graphs. `padding_page`: a page of `kv_pages` that no sequence ever owns."""

    def __init__(
        self, model: Decoder, kv_pages: Tensor, padding_page: int, max_sequences: int, capture: Capture
    ) -> None:
        self._model = model
        self.dtype = model.dtype
        self._kv_pages = kv_pages
        self._padding_page = padding_page
        self._max_sequences = max_sequences
        self._capture = capture
        self._planner = GraphPlanner(max_sequences)
        self._graphs: dict[GraphKey, tuple[StaticBatch, Replay]] = {}
        self._static_tables: StaticTables | None = None
        # The last tables on the CPU and their copy, for eager steps.
        self._uploaded: tuple[AdapterTables, AdapterTables] | None = None

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Logits `[num_logits, vocab]` float32 on the device, valid until the next call."""
        plan = self._planner.plan(_facts(batch))
        for key in plan.outgrown:
            del self._graphs[key]
        if plan.outgrown:
            self._static_tables = None
        if plan.key is None:
            return self._model.forward(self._to_device(batch))
        if plan.must_capture:
            static = StaticBatch(plan.key, self._kv_pages, self._padding_page, self._tables_for(batch), self._device)
            static.fill(batch)
            self._graphs[plan.key] = static, self._capture(lambda: self._model.forward(static.batch))
        static, replay = self._graphs[plan.key]
        static.fill(batch)
        logits = replay()
        count = len(batch.token_ids)
        if len(batch.logit_rows) == count:
            return logits[:count]
        return logits.index_select(0, uploaded_tensor(batch.logit_rows, self._device))

    @property
    def _device(self) -> torch.device:
        return self._kv_pages.device

    def _tables_for(self, batch: ForwardBatch) -> StaticTables | None:
        if batch.adapters is None:
            return None
        if self._static_tables is None:
            self._static_tables = StaticTables(
                self._max_sequences, self._planner.ceilings, batch.adapters, self._device
            )
        return self._static_tables

    def _to_device(self, batch: ForwardBatch) -> ForwardBatch:
        tables = batch.adapters
        if tables is None:
            return uploaded(batch, self._device)
        if self._uploaded is None or self._uploaded[0] is not tables:
            self._uploaded = tables, uploaded_tables(tables, self._device)
        return uploaded(batch, self._device, self._uploaded[1])


def _facts(batch: ForwardBatch) -> StepFacts:
    tokens, pages = len(batch.token_ids), batch.page_table.shape[1]
    if batch.adapters is None:
        return StepFacts(tokens, pages, batch.decode_only)
    tables = batch.adapters
    return StepFacts(
        tokens, pages, batch.decode_only, len(tables.dtype), tables.max_lora_rank, tables.page_table.shape[1]
    )
