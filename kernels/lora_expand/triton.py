"""The Triton expand: one program for a tile of tokens of one segment and a block of one module's output features."""

import triton
import triton.language as tl
from torch import Tensor

from kernels.adapters import AdapterTables, Segments
from kernels.gpu import tiles
from kernels.gpu.adapters import MAX_MODULES, VARYING, lora_arguments, num_tiles
from kernels.gpu.device import find_run, load_rows, wide_dot
from kernels.gpu.launch import Launch, ceil_div, run_all


@triton.jit
def _expand_rows(
    shrunk, width, tokens, is_token, pool, pages, page_stride, page_units, start_unit, lora_rank, in_features,
    features, block,
    UNIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`[BLOCK_T, BLOCK_N]` float32: shrunk B, block `block` of the module's output features."""
    total = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    b_unit = start_unit + lora_rank * tl.cdiv(in_features, UNIT)
    row_units = tl.cdiv(features, UNIT)
    for row in range(0, lora_rank, BLOCK_R):
        rows = row + tl.arange(0, BLOCK_R)
        at = shrunk + tokens[:, None] * width + rows[None, :]
        left = tl.load(at, mask=is_token[:, None] & (rows < lora_rank)[None, :], other=0.0)
        b = load_rows(
            pool, pages, page_stride, page_units, b_unit, row_units, rows, lora_rank, block * (BLOCK_N // UNIT),
            features, UNIT, BLOCK_N // UNIT, BLOCK_R,
        )  # fmt: skip
        total = wide_dot(left, b, total)
    return total


@triton.jit(do_not_specialize=VARYING)
def expand_kernel(
    shrunk, out, starts, segment_adapter, num_segments, pool_f32, pool_bf16, pool_f16, page_stride, page_units,
    page_table, table_stride, start_unit, lora_rank, scaling, adapter_dtype, adapter_stride, layer_offset, width,
    module_0, module_1, module_2, num_tokens, in_features, features_0, features_1, features_2, out_stride,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds to the columns of one module; a program whose tokens do not have it ends at once."""
    block = tl.program_id(1)
    blocks_0 = tl.cdiv(features_0, BLOCK_N)
    blocks_1 = tl.cdiv(features_1, BLOCK_N)
    index = (block >= blocks_0).to(tl.int32) + (block >= blocks_0 + blocks_1).to(tl.int32)
    segment, first, end = find_run(starts, num_segments, tl.program_id(0), BLOCK_T)
    if first < end:
        adapter = tl.load(segment_adapter + segment).to(tl.int64)
        has_adapter = adapter >= 0
        module = tl.where(index == 0, module_0, tl.where(index == 1, module_1, module_2))
        cell = adapter * adapter_stride + layer_offset + module
        rank = tl.load(lora_rank + cell, mask=has_adapter, other=0)
        if rank > 0:
            unit = tl.load(start_unit + cell, mask=has_adapter, other=0)
            dtype = tl.load(adapter_dtype + adapter, mask=has_adapter, other=0)
            features = tl.where(index == 0, features_0, tl.where(index == 1, features_1, features_2))
            block -= tl.where(index > 0, blocks_0, 0) + tl.where(index > 1, blocks_1, 0)
            pages = page_table + adapter * table_stride
            tokens = (first + tl.arange(0, BLOCK_T)).to(tl.int64)
            is_token = tokens < end
            narrow = shrunk + index.to(tl.int64) * num_tokens * width
            total = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
            if dtype == 0:
                total = _expand_rows(
                    narrow, width, tokens, is_token, pool_f32, pages, page_stride, page_units, unit, rank,
                    in_features, features, block, 32, BLOCK_T, BLOCK_R, BLOCK_N,
                )  # fmt: skip
            elif dtype == 1:
                total = _expand_rows(
                    narrow, width, tokens, is_token, pool_bf16, pages, page_stride, page_units, unit, rank,
                    in_features, features, block, 64, BLOCK_T, BLOCK_R, BLOCK_N,
                )  # fmt: skip
            else:
                total = _expand_rows(
                    narrow, width, tokens, is_token, pool_f16, pages, page_stride, page_units, unit, rank,
                    in_features, features, block, 64, BLOCK_T, BLOCK_R, BLOCK_N,
                )  # fmt: skip
            column = tl.where(index > 0, features_0, 0) + tl.where(index > 1, features_1, 0)
            columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
            at = out + tokens[:, None] * out_stride + (column + columns)[None, :]
            mask = is_token[:, None] & (columns < features)[None, :]
            base = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            scale = tl.load(scaling + cell, mask=has_adapter, other=0.0)
            tl.store(at, (base + scale * total).to(out.dtype.element_ty), mask=mask)


def launches(
    shrunk: Tensor,
    adapters: AdapterTables,
    segments: Segments,
    layer: int,
    modules: tuple[int, ...],
    in_features: int,
    out_features: tuple[int, ...],
    out: Tensor,
) -> list[Launch]:
    num_tokens = len(out)
    tile = tiles.choose("lora_expand", tiles.token_class(num_tokens), out.device)
    features = (*out_features, 0, 0)[:MAX_MODULES]
    sizes = {f"features_{index}": size for index, size in enumerate(features)}
    arguments = lora_arguments(adapters, segments, layer, modules)
    own = {"num_tokens": num_tokens, "in_features": in_features, "out_stride": out.stride(0)}
    columns = sum(ceil_div(size, tile["BLOCK_N"]) for size in out_features)
    expand = Launch(
        expand_kernel,
        (num_tiles(num_tokens, len(segments.adapter), tile["BLOCK_T"]), columns),
        {"shrunk": shrunk, "out": out, "scaling": adapters.scaling} | own | sizes | arguments,
        {name: tile[name] for name in ("BLOCK_T", "BLOCK_R", "BLOCK_N")},
        tile["num_warps"],
        tile["num_stages"],
    )
    return [expand]


def lora_expand_triton(
    shrunk: Tensor,
    adapters: AdapterTables,
    segments: Segments,
    layer: int,
    modules: tuple[int, ...],
    in_features: int,
    out_features: tuple[int, ...],
    out: Tensor,
) -> None:
    run_all(launches(shrunk, adapters, segments, layer, modules, in_features, out_features, out))
