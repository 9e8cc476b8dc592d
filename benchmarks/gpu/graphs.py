"""A captured decode step replayed with other adapters, ranks and counts gives what the same step gives eagerly."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.gpu.inputs import make_batch, make_paged, make_segments, make_tables
from benchmarks.gpu.shapes import TINY
from benchmarks.gpu.steps import CPU, on_cpu, random_decoder
from gpu_worker.batch import ForwardBatch
from gpu_worker.cuda.executor import CudaGraphs, Executor, Replay, call_again
from gpu_worker.cuda.static_batch import uploaded, uploaded_tables
from kernels import dispatch
from kernels.adapters import AdapterTables
from kernels.gpu import tiles

MAX_SEQUENCES, CONTEXT = 4, 33
RANKS = (8, 1, 64, 256)
# Ranks of the step's adapters, one a sequence from the last on; the first step captures.
STEPS: tuple[tuple[int, tuple[int, ...]], ...] = ((4, (8,)), (3, (1,)), (4, (64, 256)), (3, (1, 64, 256)), (4, ()))
BEFORE_GROWTH = 2


class CountingCaptures:
    """Counts captures, whatever makes them."""

    def __init__(self, capture: Callable[[Callable[[], Tensor]], Replay]) -> None:
        self._capture = capture
        self.count = 0

    def __call__(self, run: Callable[[], Tensor]) -> Replay:
        self.count += 1
        return self._capture(run)


def _chosen(library: AdapterTables, ranks: tuple[int, ...]) -> AdapterTables:
    rows = torch.tensor([RANKS.index(rank) for rank in ranks])
    names = ("page_table", "start_unit", "lora_rank", "scaling", "dtype")
    return replace(library, max_lora_rank=max(ranks), **{name: getattr(library, name)[rows] for name in names})


def _eager(batch: ForwardBatch, device: torch.device) -> ForwardBatch:
    """On the device, with keys and values of its own."""
    tables = None if batch.adapters is None else uploaded_tables(batch.adapters, device)
    return replace(uploaded(batch, device, tables), kv_pages=batch.kv_pages.clone())


def rows(device: torch.device) -> Iterator[dict[str, object]]:
    """Bit for bit, with the kernels of `deterministic`: eager steps are not padded to a bucket."""
    generator = torch.Generator(device).manual_seed(11)
    decoder = random_decoder(TINY, torch.bfloat16, device, 64)
    library = on_cpu(make_tables(TINY, list(RANKS), torch.bfloat16, generator))
    captures = CountingCaptures(call_again if device.type == "cpu" else CudaGraphs())
    paged = make_paged(TINY, [(1, CONTEXT)] * MAX_SEQUENCES + [(0, 1)], torch.bfloat16, generator)
    # The executor pads into the last page of the pool: one more that no table names.
    kv_pages = torch.cat((paged.kv_pages, torch.zeros_like(paged.kv_pages[:1])))
    executor = Executor(decoder, kv_pages, len(kv_pages) - 1, MAX_SEQUENCES, captures)
    tiles.set_deterministic(True)
    try:
        with dispatch.force("triton"), torch.inference_mode():
            for step, (sequences, ranks) in enumerate(STEPS):
                tables = _chosen(library, ranks) if ranks else None
                cut = {name: getattr(paged, name)[:sequences] for name in ("page_table", "context_lens", "positions")}
                own = replace(
                    paged,
                    **cut,
                    kv_pages=kv_pages,
                    query_start=paged.query_start[: sequences + 1],
                    slot_mapping=paged.slot_mapping[:sequences],
                    lengths=paged.lengths[:sequences],
                )
                segments = make_segments(sequences, len(ranks), CPU, sequences - len(ranks))
                batch = replace(make_batch(TINY, own, tables, CPU), segments=segments)
                wanted = decoder.forward(_eager(batch, device))
                same = torch.equal(executor.forward(batch), wanted)
                case = f"step {step}: {sequences} sequences, ranks {list(ranks)}, {captures.count} captures"
                yield {"op": "cuda_graph", "case": case, "passed": same and captures.count <= 1 + step // BEFORE_GROWTH}
    finally:
        tiles.set_deterministic(False)
