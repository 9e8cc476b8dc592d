"""Puts an engine on a GPU: the size of its pool, the pool, and the executor between model runner and decoder."""

import logging

import torch

from gpu_worker.batch import ForwardBatch
from gpu_worker.cuda.executor import CudaGraphs, Executor
from gpu_worker.cuda.sizing import pool_bytes
from gpu_worker.memory.geometry import PageGeometry
from gpu_worker.memory.pool import PagePool
from gpu_worker.models.decoder import Decoder
from kernels.adapters import Segments
from kernels.paged_attention.libraries import HostIndices, refusals

_log = logging.getLogger(__name__)


def widest_batch(model: Decoder, geometry: PageGeometry, tokens: int, sequences: int) -> ForwardBatch:
    """A prompt of `tokens` that wants the logits of `sequences`; all layers share the pages of one."""
    device, count = model.device, geometry.pages_for_tokens(tokens)
    cell = count, 1, 2, geometry.page_size, geometry.num_kv_heads, geometry.head_dim
    positions = torch.arange(tokens, device=device)
    table = torch.arange(count, dtype=torch.int32)[None]
    host = HostIndices(table, torch.tensor([0, tokens], dtype=torch.int32), torch.tensor([tokens], dtype=torch.int32))
    whole = host.query_start.to(device)
    return ForwardBatch(
        token_ids=torch.zeros_like(positions),
        positions=positions,
        slot_mapping=positions,
        page_table=table.to(device),
        query_start=whole,
        context_lens=whole[1:],
        logit_rows=positions[:sequences],
        segments=Segments(whole, torch.tensor([-1], dtype=torch.int32, device=device)),
        adapters=None,
        kv_pages=torch.empty(cell, dtype=model.dtype, device=device).expand(-1, geometry.num_layers, -1, -1, -1, -1),
        # an attention library takes what it needs for good here, so that it is counted
        host=host,
    )


def profiled_pool_bytes(
    model: Decoder, geometry: PageGeometry, share: float, max_step_tokens: int, max_sequences: int
) -> int:
    """`share` of the free memory of the device, less what the largest step takes; measured by running one.

    Raises ValueError with the numbers when nothing is left.
    """
    tokens = min(max_step_tokens, model.config.geometry.max_context_tokens)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    batch = widest_batch(model, geometry, tokens, max_sequences)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        model.forward(batch)
    peak = torch.cuda.max_memory_allocated() - before
    return pool_bytes(free, peak * max_step_tokens // tokens, share)


def place(model: Decoder, geometry: PageGeometry, num_pages: int, max_sequences: int) -> tuple[PagePool, Executor]:
    """The pool has one page behind the manager's `num_pages`: the executor's padding.

    Logs which attention library is there and not used. Raises ValueError when it is the one that was asked for.
    """
    for sentence in refusals(model.dtype, geometry.page_size, geometry.head_dim):
        _log.warning("an attention library is not used: %s", sentence)
    pool = PagePool(geometry, num_pages + 1, "cuda")
    return pool, Executor(model, pool.kv_pages(model.dtype), num_pages, max_sequences, CudaGraphs())
