"""`deterministic`: a token has the same bits alone and among others, and however its prompt was cut.

A control beside each: with the sums taken in another order the same comparison must fail.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.gpu.inputs import make_paged, make_segments, make_tables
from benchmarks.gpu.shapes import QKV, ModelShape
from kernels import dispatch
from kernels.adapters import Segments
from kernels.gpu import tiles
from kernels.linear import linear
from kernels.lora_expand import lora_expand
from kernels.lora_shrink import lora_shrink
from kernels.paged_attention import paged_attention

# Rows of the batch, and those of them that also run alone.
ROWS, FEW = 70, 3
CONTEXT, NEW, CUT = 600, 43, 17
RANKS = [24, 1, 8]
# (together, alone), each made anew.
Pair = Callable[[], tuple[Tensor, Tensor]]


def _product(model: ModelShape, generator: torch.Generator) -> Pair:
    device = generator.device
    x, weight = (torch.randn(rows, model.hidden, generator=generator, device=device) for rows in (ROWS, 96))
    return lambda: (linear(x, weight)[:FEW], linear(x[:FEW], weight))


def _lora(model: ModelShape, generator: torch.Generator) -> Pair:
    """The first tokens of the last adapter, whose rank differs from those beside it."""
    device, width = generator.device, sum(model.qkv)
    tables = make_tables(model, RANKS, torch.bfloat16, generator, ("q_proj", "k_proj", "v_proj"))
    x = torch.randn(ROWS, model.hidden, generator=generator, device=device)
    first = ROWS // 10 + 2 * (ROWS - ROWS // 10) // 3

    def delta(rows: Tensor, starts: Tensor, owners: Tensor) -> Tensor:
        segments = Segments(starts, owners)
        out = torch.ones(len(rows), width, device=device)
        shrunk = lora_shrink(rows, tables, segments, 0, QKV)
        lora_expand(shrunk, tables, segments, 0, QKV, model.hidden, model.qkv, out)
        return out

    whole = make_segments(ROWS, len(RANKS), device, ROWS // 10)
    one = torch.tensor([0, FEW], dtype=torch.int32, device=device)
    return lambda: (
        delta(x, whole.starts, whole.adapter)[first : first + FEW],
        delta(x[first : first + FEW], one, whole.adapter[-1:]),
    )


def _decode(model: ModelShape, generator: torch.Generator) -> Pair:
    lengths = [(1, CONTEXT), (1, 40), (1, CONTEXT - 9), (1, 1)]
    paged = make_paged(model, lengths, torch.float32, generator, layers=1)
    query = torch.randn(len(lengths), model.heads, model.head_dim, generator=generator, device=generator.device)

    def attend(rows: slice) -> Tensor:
        starts = torch.arange(rows.stop - rows.start + 1, dtype=torch.int32, device=query.device)
        table, contexts = paged.page_table[rows], paged.context_lens[rows]
        return paged_attention(query[rows], paged.kv_pages, table, starts, contexts, 0, 0.1)

    return lambda: (attend(slice(0, len(lengths)))[2:3], attend(slice(2, 3)))


def _prompt(model: ModelShape, generator: torch.Generator) -> Pair:
    paged = make_paged(model, [(NEW, CONTEXT)], torch.float32, generator, layers=1)
    query = torch.randn(NEW, model.heads, model.head_dim, generator=generator, device=generator.device)

    def attend(start: int, end: int) -> Tensor:
        starts = torch.tensor([0, end - start], dtype=torch.int32, device=query.device)
        context = torch.tensor([CONTEXT - NEW + end], dtype=torch.int32, device=query.device)
        return paged_attention(query[start:end], paged.kv_pages, paged.page_table, starts, context, 0, 0.1)

    return lambda: (attend(0, NEW), torch.cat((attend(0, CUT), attend(CUT, NEW))))


# Case -> (operation, class of the tile, what another order of its sums is, how both are made)
CASES = {
    f"{FEW} rows alone and among {ROWS}": ("linear", tiles.DECODE, {"BLOCK_K": 32}, _product),
    f"{FEW} tokens of an adapter alone and among {ROWS}": (
        "lora_shrink",
        tiles.DECODE,
        {"BLOCK_K": 64, "SPLIT_K": 1},
        _lora,
    ),
    "a decode alone and among 4": ("paged_attention", tiles.DECODE, {"CHUNK": 256}, _decode),
    f"a prompt of {NEW} tokens whole and cut": ("paged_attention", tiles.PREFILL, {"CHUNK": 256}, _prompt),
}


def rows(model: ModelShape, device: torch.device) -> Iterator[dict[str, object]]:
    tiles.set_deterministic(True)
    try:
        for case, (op, shape_class, other, make) in CASES.items():
            with dispatch.force("triton"), torch.inference_mode():
                pair = make(model, torch.Generator(device).manual_seed(9))
                together, alone = pair()
                with tiles.force(op, shape_class, {**tiles.choose(op, shape_class, device), **other}):
                    reordered = pair()[1]
            same, noticed = torch.equal(together, alone), not torch.equal(together, reordered)
            yield {"op": op, "case": f"{case}, deterministic", "share": 0.0, "passed": same and noticed}
    finally:
        tiles.set_deterministic(False)
