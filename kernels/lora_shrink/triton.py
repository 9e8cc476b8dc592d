"""The Triton shrink: one program for a tile of tokens of one segment, a module, and a part of the input features."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.adapters import AdapterTables, Segments
from kernels.gpu import tiles
from kernels.gpu.adapters import VARYING, lora_arguments, num_tiles
from kernels.gpu.device import find_run, load_rows, narrow_dot
from kernels.gpu.launch import Argument, Launch, ceil_div, run_all

SUM_BLOCK = 1024


@triton.jit
def _shrink_rows(
    x, x_stride, tokens, is_token, pool, pages, page_stride, page_units, start_unit, first_row, lora_rank,
    in_features, part,
    UNIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """`[BLOCK_T, BLOCK_R]` float32: the tokens times rows `first_row` on of A, over part `part` of the features."""
    total = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    rows = first_row + tl.arange(0, BLOCK_R)
    row_units = tl.cdiv(in_features, UNIT)
    blocks = tl.cdiv(in_features, BLOCK_K)
    part_blocks = tl.cdiv(blocks, SPLIT_K)
    for block in range(part * part_blocks, tl.minimum((part + 1) * part_blocks, blocks)):
        columns = block * BLOCK_K + tl.arange(0, BLOCK_K)
        at = x + tokens.to(tl.int64)[:, None] * x_stride + columns[None, :]
        left = tl.load(at, mask=is_token[:, None] & (columns < in_features)[None, :], other=0.0)
        unit = block * (BLOCK_K // UNIT)
        a = load_rows(
            pool, pages, page_stride, page_units, start_unit, row_units, rows, lora_rank, unit, in_features,
            UNIT, BLOCK_K // UNIT, BLOCK_R,
        )  # fmt: skip
        total = narrow_dot(left, tl.trans(a), total)
    return total


@triton.jit(do_not_specialize=VARYING)
def shrink_kernel(
    x, out, starts, segment_adapter, num_segments, pool_f32, pool_bf16, pool_f16, page_stride, page_units,
    page_table, table_stride, start_unit, lora_rank, adapter_dtype, adapter_stride, layer_offset, width, module_0,
    module_1, module_2, num_tokens, in_features, x_stride,
    NUM_MODULES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
):  # fmt: skip
    """out: `[SPLIT_K, NUM_MODULES, num_tokens, width]` float32; every element of it is written by some program."""
    index = tl.program_id(1)
    part = tl.program_id(2)
    segment, first, end = find_run(starts, num_segments, tl.program_id(0), BLOCK_T)
    if first < end:
        adapter = tl.load(segment_adapter + segment).to(tl.int64)
        has_adapter = adapter >= 0
        module = tl.where(index == 0, module_0, tl.where(index == 1, module_1, module_2))
        cell = adapter * adapter_stride + layer_offset + module
        rank = tl.load(lora_rank + cell, mask=has_adapter, other=0)
        unit = tl.load(start_unit + cell, mask=has_adapter, other=0)
        dtype = tl.load(adapter_dtype + adapter, mask=has_adapter, other=0)
        pages = page_table + adapter * table_stride
        tokens = first + tl.arange(0, BLOCK_T)
        is_token = tokens < end
        plane = (part * NUM_MODULES + index).to(tl.int64) * num_tokens
        for row in range(0, width, BLOCK_R):
            total = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
            if row < rank:
                if dtype == 0:
                    total = _shrink_rows(
                        x, x_stride, tokens, is_token, pool_f32, pages, page_stride, page_units, unit, row, rank,
                        in_features, part, 32, BLOCK_T, BLOCK_R, BLOCK_K, SPLIT_K,
                    )  # fmt: skip
                elif dtype == 1:
                    total = _shrink_rows(
                        x, x_stride, tokens, is_token, pool_bf16, pages, page_stride, page_units, unit, row, rank,
                        in_features, part, 64, BLOCK_T, BLOCK_R, BLOCK_K, SPLIT_K,
                    )  # fmt: skip
                else:
                    total = _shrink_rows(
                        x, x_stride, tokens, is_token, pool_f16, pages, page_stride, page_units, unit, row, rank,
                        in_features, part, 64, BLOCK_T, BLOCK_R, BLOCK_K, SPLIT_K,
                    )  # fmt: skip
            columns = row + tl.arange(0, BLOCK_R)
            at = out + (plane + tokens)[:, None] * width + columns[None, :]
            tl.store(at, total, mask=is_token[:, None] & (columns < width)[None, :])


@triton.jit(do_not_specialize=["size"])
def sum_kernel(parts, out, size, SPLIT_K: tl.constexpr, BLOCK: tl.constexpr):
    """out `[size]` = the sum of parts `[SPLIT_K, size]`, in order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(SPLIT_K):
        total += tl.load(parts + part * size.to(tl.int64) + at, mask=at < size, other=0.0)
    tl.store(out + at, total, mask=at < size)


def launches(
    x: Tensor, adapters: AdapterTables, segments: Segments, layer: int, modules: tuple[int, ...]
) -> tuple[Tensor, list[Launch]]:
    """The result, and what computes it."""
    x = x.contiguous()
    num_tokens, in_features = x.shape
    shape = len(modules), num_tokens, adapters.max_lora_rank
    tile = tiles.choose("lora_shrink", tiles.token_class(num_tokens), x.device)
    split = tile["SPLIT_K"]
    out = torch.empty(shape, dtype=torch.float32, device=x.device)
    parts = out if split == 1 else torch.empty(split, *shape, dtype=torch.float32, device=x.device)
    blocks = {name: tile[name] for name in ("BLOCK_T", "BLOCK_R", "BLOCK_K", "SPLIT_K")}
    arguments = lora_arguments(adapters, segments, layer, modules)
    arguments |= {"x": x, "out": parts, "num_tokens": num_tokens, "in_features": in_features, "x_stride": x.stride(0)}
    shrink = Launch(
        shrink_kernel,
        (num_tiles(num_tokens, len(segments.adapter), tile["BLOCK_T"]), len(modules), split),
        arguments,
        {"NUM_MODULES": len(modules)} | blocks,
        tile["num_warps"],
        tile["num_stages"],
    )
    if split == 1:
        return out, [shrink]
    size: dict[str, Argument] = {"parts": parts, "out": out, "size": out.numel()}
    grid = (ceil_div(out.numel(), SUM_BLOCK),)
    return out, [shrink, Launch(sum_kernel, grid, size, {"SPLIT_K": split, "BLOCK": SUM_BLOCK})]


def lora_shrink_triton(
    x: Tensor, adapters: AdapterTables, segments: Segments, layer: int, modules: tuple[int, ...]
) -> Tensor:
    out, work = launches(x, adapters, segments, layer, modules)
    run_all(work)
    return out
