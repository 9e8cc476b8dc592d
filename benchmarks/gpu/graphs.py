"""A captured decode step replayed with other adapters, ranks and counts gives what the same step gives eagerly."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.gpu.inputs import make_batch, make_paged, make_segments, make_tables
from benchmarks.gpu.shapes import TINY
from benchmarks.gpu.steps import CPU, on_cpu, random_decoder
from gpu_worker.batch import Feed, ForwardBatch
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


@contextmanager
def _no_waits(device: torch.device) -> Iterator[None]:
    """PyTorch raises RuntimeError when the host waits for the device inside; a CPU has nobody to wait for."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def waits_row(device: torch.device) -> dict[str, object]:
    """A replayed decode and a prompt are launched without a wait; the control looks at a logit, and is noticed."""
    generator = torch.Generator(device).manual_seed(12)
    decoder = random_decoder(TINY, torch.bfloat16, device, 64)
    tables = on_cpu(make_tables(TINY, [8, 24], torch.bfloat16, generator))
    capture = call_again if device.type == "cpu" else CudaGraphs()
    paged = make_paged(TINY, [(1, CONTEXT)] * 2, torch.bfloat16, generator)
    # the executor pads into the last page
    kv_pages = torch.cat((paged.kv_pages, torch.zeros_like(paged.kv_pages[:1])))
    batch = make_batch(TINY, replace(paged, kv_pages=kv_pages), tables, CPU)
    batch = replace(batch, feed=Feed(torch.tensor([1]), torch.ones(1, dtype=torch.int64, device=device)))
    executor = Executor(decoder, kv_pages, len(kv_pages) - 1, MAX_SEQUENCES, capture)
    noticed, failure = device.type == "cpu", ""
    with dispatch.force("triton"), torch.inference_mode():
        executor.forward(batch)
        logits = executor.forward(replace(batch, decode_only=False))
        try:
            with _no_waits(device):
                for again in (batch, replace(batch, decode_only=False)):
                    logits = executor.forward(again)
        except RuntimeError as error:
            failure = str(error)
        try:
            with _no_waits(device):
                logits[0, 0].item()
        except RuntimeError:
            noticed = True
    case = "a replayed decode and a prompt" + (f": {failure}" if failure else "")
    return {"op": "no_waits", "case": case, "passed": noticed and not failure}


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
