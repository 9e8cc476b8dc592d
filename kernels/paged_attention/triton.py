"""The Triton attention: decodes split over their context and merged, and tiles of prefill chunks over the pages."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu import tiles
from kernels.gpu.adapters import num_tiles
from kernels.gpu.device import find_run, narrow_dot, wide_dot
from kernels.gpu.launch import Argument, Launch, ceil_div, next_power_of_two, run_all

# Integers that change from step to step or from layer to layer.
VARYING = ("num_sequences", "num_chunks", "table_stride")
LOG2_E = 1.4426950408889634


@triton.jit
def _attend_block(
    query, best, total, mixed, keys, values, table, block, context, first_key, last_key, page_stride, slot_stride,
    scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PAGE_SIZE: tl.constexpr,
):  # fmt: skip
    """One block of keys into the running (best, total, mixed) of the rows; row r sees keys first_key[r]..last_key[r].

    keys, values: pointers to one layer and KV head of page 0. scale: of scores in units of log2.
    """
    key = block * BLOCK_N + tl.arange(0, BLOCK_N)
    dim = tl.arange(0, BLOCK_D)
    live = key < context
    page = tl.load(table + key // PAGE_SIZE, mask=live, other=0)
    base = page.to(tl.int64) * page_stride + (key % PAGE_SIZE).to(tl.int64) * slot_stride
    mask = live[:, None] & (dim < HEAD_DIM)[None, :]
    at = base[:, None] + dim[None, :]
    k = tl.load(keys + at, mask=mask, other=0.0)
    scores = narrow_dot(query, tl.trans(k), tl.zeros((query.shape[0], BLOCK_N), tl.float32)) * scale
    seen = (key[None, :] >= first_key[:, None]) & (key[None, :] <= last_key[:, None])
    scores = tl.where(seen, scores, float("-inf"))
    peak = tl.maximum(best, tl.max(scores, 1))
    # a row that has seen nothing yet: no difference of infinities
    anchor = tl.where(peak == float("-inf"), 0.0, peak)
    weights = tl.exp2(scores - anchor[:, None])
    faded = tl.exp2(best - anchor)
    v = tl.load(values + at, mask=mask, other=0.0)
    return peak, total * faded + tl.sum(weights, 1), wide_dot(weights, v, mixed * faded[:, None])


@triton.jit
def _merge(best, total, mixed, part_best, part_total, part_mixed):
    """Two parts of a softmax, by their largest scores and sums; the first may be empty."""
    peak = tl.maximum(best, part_best)
    anchor = tl.where(peak == float("-inf"), 0.0, peak)
    ours = tl.exp2(best - anchor)
    theirs = tl.exp2(part_best - anchor)
    return peak, total * ours + part_total * theirs, mixed * ours[:, None] + part_mixed * theirs[:, None]


@triton.jit(do_not_specialize=VARYING)
def decode_kernel(
    query, keys, values, out, part_scores, part_mixed, page_table, query_start, context_lens, num_sequences,
    num_chunks, table_stride, page_stride, slot_stride, head_stride, scale,
    GROUP: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, PAGE_SIZE: tl.constexpr, WINDOW: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):  # fmt: skip
    """A sequence's one token, the query heads of one KV head, one chunk of the context.

    IS_WHOLE: one chunk holds any context, and the result goes to `out`. Else part_scores
    `[num_sequences, HEADS, num_chunks, 2]` gets largest score and sum, part_mixed `[.., HEAD_DIM]` the mixed values.
    """
    sequence = tl.program_id(0)
    kv_head = tl.program_id(1)
    chunk = tl.program_id(2)
    token = tl.load(query_start + sequence)
    count = tl.load(query_start + sequence + 1) - token
    context = tl.load(context_lens + sequence)
    first = tl.maximum(context - WINDOW, 0) if WINDOW > 0 else 0
    if (count == 1) & (chunk * CHUNK < context) & ((chunk + 1) * CHUNK > first):
        row = tl.arange(0, BLOCK_M)
        dim = tl.arange(0, BLOCK_D)
        head = kv_head * GROUP + row
        mask = (row < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
        at = (token.to(tl.int64) * HEADS + head)[:, None] * HEAD_DIM + dim[None, :]
        q = tl.load(query + at, mask=mask, other=0.0)
        best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        mixed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        first_key = tl.full((BLOCK_M,), 0, tl.int32) + first
        last_key = tl.full((BLOCK_M,), 0, tl.int32) + context - 1
        offset = kv_head.to(tl.int64) * head_stride
        table = page_table + sequence.to(tl.int64) * table_stride
        low = tl.maximum(chunk * CHUNK, first) // BLOCK_N
        high = tl.cdiv(tl.minimum((chunk + 1) * CHUNK, context), BLOCK_N)
        for block in range(low, high):
            best, total, mixed = _attend_block(
                q, best, total, mixed, keys + offset, values + offset, table, block, context, first_key, last_key,
                page_stride, slot_stride, scale, HEAD_DIM, BLOCK_D, BLOCK_N, PAGE_SIZE,
            )  # fmt: skip
        if IS_WHOLE:
            tl.store(out + at, (mixed / total[:, None]).to(out.dtype.element_ty), mask=mask)
        else:
            part = (sequence.to(tl.int64) * HEADS + head) * num_chunks + chunk
            tl.store(part_scores + part * 2, best, mask=row < GROUP)
            tl.store(part_scores + part * 2 + 1, total, mask=row < GROUP)
            tl.store(part_mixed + part[:, None] * HEAD_DIM + dim[None, :], mixed, mask=mask)


@triton.jit(do_not_specialize=VARYING)
def merge_kernel(
    out, part_scores, part_mixed, query_start, context_lens, num_chunks,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """The parts of one decoding token and head, merged in the order of the chunks."""
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    token = tl.load(query_start + sequence)
    count = tl.load(query_start + sequence + 1) - token
    context = tl.load(context_lens + sequence)
    if count == 1:
        first = tl.maximum(context - WINDOW, 0) if WINDOW > 0 else 0
        row = tl.arange(0, 1)
        dim = tl.arange(0, BLOCK_D)
        best = tl.full((1,), float("-inf"), tl.float32)
        total = tl.zeros((1,), tl.float32)
        mixed = tl.zeros((1, BLOCK_D), tl.float32)
        mask = (row == 0)[:, None] & (dim < HEAD_DIM)[None, :]
        for chunk in range(first // CHUNK, tl.cdiv(context, CHUNK)):
            part = (sequence.to(tl.int64) * HEADS + head) * num_chunks + chunk + row
            best, total, mixed = _merge(
                best, total, mixed,
                tl.load(part_scores + part * 2, mask=row == 0, other=0.0),
                tl.load(part_scores + part * 2 + 1, mask=row == 0, other=0.0),
                tl.load(part_mixed + part[:, None] * HEAD_DIM + dim[None, :], mask=mask, other=0.0),
            )  # fmt: skip
        at = out + ((token.to(tl.int64) * HEADS + head) + row)[:, None] * HEAD_DIM + dim[None, :]
        tl.store(at, (mixed / total[:, None]).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=VARYING)
def prefill_kernel(
    query, keys, values, out, page_table, query_start, context_lens, num_sequences, table_stride, page_stride,
    slot_stride, head_stride, scale,
    GROUP: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, PAGE_SIZE: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """BLOCK_M // GROUP tokens of one chunk of a prompt with all query heads of one KV head; decodes are left out.

    The context goes by in the chunks of `decode_kernel`, merged as `merge_kernel` does: a token has the same chain of
    sums however its prompt was cut.
    """
    tokens_per_tile: tl.constexpr = BLOCK_M // GROUP
    kv_head = tl.program_id(1)
    sequence, tile, end = find_run(query_start, num_sequences, tl.program_id(0), tokens_per_tile)
    start = tl.load(query_start + sequence)
    if (tile < end) & (end - start > 1):
        context = tl.load(context_lens + sequence)
        row = tl.arange(0, BLOCK_M)
        dim = tl.arange(0, BLOCK_D)
        token = tile + row // GROUP
        is_row = (row < tokens_per_tile * GROUP) & (token < end)
        head = kv_head * GROUP + row % GROUP
        mask = is_row[:, None] & (dim < HEAD_DIM)[None, :]
        at = (token.to(tl.int64) * HEADS + head)[:, None] * HEAD_DIM + dim[None, :]
        q = tl.load(query + at, mask=mask, other=0.0)
        last_key = tl.where(is_row, context - end + token, -1)
        first_key = last_key - WINDOW + 1 if WINDOW > 0 else tl.zeros_like(last_key)
        last = context - end + tl.minimum(tile + tokens_per_tile, end) - 1
        first = tl.maximum(context - end + tile - WINDOW + 1, 0) if WINDOW > 0 else 0
        best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        mixed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        offset = kv_head.to(tl.int64) * head_stride
        table = page_table + sequence.to(tl.int64) * table_stride
        for chunk in range(first // CHUNK, last // CHUNK + 1):
            part_best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
            part_total = tl.zeros((BLOCK_M,), tl.float32)
            part_mixed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
            low = tl.maximum(chunk * CHUNK, first) // BLOCK_N
            high = tl.minimum((chunk + 1) * CHUNK, last + 1)
            for block in range(low, tl.cdiv(high, BLOCK_N)):
                part_best, part_total, part_mixed = _attend_block(
                    q, part_best, part_total, part_mixed, keys + offset, values + offset, table, block, context,
                    first_key, last_key, page_stride, slot_stride, scale, HEAD_DIM, BLOCK_D, BLOCK_N, PAGE_SIZE,
                )  # fmt: skip
            best, total, mixed = _merge(best, total, mixed, part_best, part_total, part_mixed)
        total = tl.where(is_row, total, 1.0)
        tl.store(out + at, (mixed / total[:, None]).to(out.dtype.element_ty), mask=mask)


def launches(
    query: Tensor,
    kv_pages: Tensor,
    page_table: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    layer: int,
    scale: float,
    sliding_window: int,
    decode_only: bool,
) -> tuple[Tensor, list[Launch]]:
    """The result, and what computes it."""
    out = torch.empty_like(query)
    if query.shape[0] == 0:
        return out, []
    page_stride, _, _, slot_stride, head_stride, _ = kv_pages.stride()
    cells = kv_pages[:, layer]
    common: dict[str, Argument] = {
        "query": query,
        "keys": cells[:, 0],
        "values": cells[:, 1],
        "out": out,
        "page_table": page_table,
        "query_start": query_start,
        "context_lens": context_lens,
        "num_sequences": len(context_lens),
        "table_stride": page_table.stride(0),
        "page_stride": page_stride,
        "slot_stride": slot_stride,
        "head_stride": head_stride,
        "scale": scale * LOG2_E,
    }
    num_heads, head_dim = query.shape[1:]
    constants = {
        "GROUP": num_heads // kv_pages.shape[4],
        "HEADS": num_heads,
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, next_power_of_two(head_dim)),
        "PAGE_SIZE": kv_pages.shape[3],
        "WINDOW": sliding_window,
    }
    work = _decodes(common, constants, out)
    return out, work if decode_only else [*work, _prefills(common, constants, out)]


def _decodes(common: dict[str, Argument], constants: dict[str, int], out: Tensor) -> list[Launch]:
    table, heads, head_dim = common["page_table"], constants["HEADS"], constants["HEAD_DIM"]
    assert isinstance(table, Tensor)
    tile = tiles.choose("paged_attention", tiles.DECODE, out.device)
    chunks = max(1, ceil_div(table.shape[1] * constants["PAGE_SIZE"], tile["CHUNK"]))
    parts = len(table), heads, chunks
    scratch: dict[str, Argument] = {
        "part_scores": torch.empty(*parts, 2, dtype=torch.float32, device=out.device),
        "part_mixed": torch.empty(*parts, head_dim, dtype=torch.float32, device=out.device),
        "num_chunks": chunks,
    }
    blocks = {"BLOCK_M": max(tile["BLOCK_M"], next_power_of_two(constants["GROUP"])), "BLOCK_N": tile["BLOCK_N"]}
    blocks |= {"CHUNK": tile["CHUNK"], "IS_WHOLE": chunks == 1}
    grid = len(table), heads // constants["GROUP"], chunks
    decode = Launch(decode_kernel, grid, common | scratch, constants | blocks, tile["num_warps"], tile["num_stages"])
    if chunks == 1:
        return [decode]
    arguments = {name: common[name] for name in ("out", "query_start", "context_lens")} | scratch
    shape = {name: constants[name] for name in ("HEADS", "HEAD_DIM", "BLOCK_D", "WINDOW")}
    return [decode, Launch(merge_kernel, (len(table), heads), arguments, shape | {"CHUNK": tile["CHUNK"]}, 1)]


def _prefills(common: dict[str, Argument], constants: dict[str, int], out: Tensor) -> Launch:
    tile = tiles.choose("paged_attention", tiles.PREFILL, out.device)
    group = constants["GROUP"]
    rows = max(tile["BLOCK_M"], next_power_of_two(group))
    sequences = common["num_sequences"]
    assert isinstance(sequences, int)
    grid = num_tiles(len(out), sequences, rows // group), constants["HEADS"] // group
    blocks = {"BLOCK_M": rows, "BLOCK_N": tile["BLOCK_N"], "CHUNK": tile["CHUNK"]}
    return Launch(prefill_kernel, grid, common, constants | blocks, tile["num_warps"], tile["num_stages"])


def paged_attention_triton(
    query: Tensor,
    kv_pages: Tensor,
    page_table: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    layer: int,
    scale: float,
    sliding_window: int,
    decode_only: bool = False,
) -> Tensor:
    out, work = launches(
        query, kv_pages, page_table, query_start, context_lens, layer, scale, sliding_window, decode_only
    )
    run_all(work)
    return out
