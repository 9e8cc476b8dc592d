"""The Triton rotation and store: some heads of one token a program, queries, keys and values in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import Argument, Launch, ceil_div, next_power_of_two, run_all

BLOCK_H = 8


@triton.jit
def _rotated(x, at, second, mask, cos, sin):
    """The two halves of rotated heads, in x's dtype; `at` points to the first, the other is `second` behind."""
    first_half = tl.load(x + at, mask=mask, other=0.0)
    second_half = tl.load(x + at + second, mask=mask, other=0.0)
    first = first_half.to(tl.float32)
    last = second_half.to(tl.float32)
    return (first * cos - last * sin).to(first_half.dtype), (last * cos + first * sin).to(first_half.dtype)


@triton.jit
def store_kv_kernel(
    query, key, value, rotated, keys, values, cos_sin, positions, slot_mapping, query_stride, query_head_stride,
    key_stride, key_head_stride, value_stride, value_head_stride, page_stride, slot_stride, head_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """keys, values: pointers to one layer of page 0. Blocks of query heads come first, then those of KV heads."""
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    query_blocks: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    dim = tl.arange(0, BLOCK_HALF)
    is_dim = dim < HALF
    angle = cos_sin + tl.load(positions + token) * (2 * HALF) + dim
    cos = tl.load(angle, mask=is_dim, other=0.0)[None, :]
    sin = tl.load(angle + HALF, mask=is_dim, other=0.0)[None, :]
    if block < query_blocks:
        head = block * BLOCK_H + tl.arange(0, BLOCK_H)
        mask = (head < HEADS)[:, None] & is_dim[None, :]
        at = token * query_stride + head.to(tl.int64)[:, None] * query_head_stride + dim[None, :]
        first, second = _rotated(query, at, HALF, mask, cos, sin)
        to = (token * HEADS + head)[:, None] * (2 * HALF) + dim[None, :]
        tl.store(rotated + to, first, mask=mask)
        tl.store(rotated + to + HALF, second, mask=mask)
    else:
        head = (block - query_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
        mask = (head < KV_HEADS)[:, None] & is_dim[None, :]
        wide = head.to(tl.int64)[:, None]
        at = token * key_stride + wide * key_head_stride + dim[None, :]
        first, second = _rotated(key, at, HALF, mask, cos, sin)
        slot = tl.load(slot_mapping + token)
        to = slot // PAGE_SIZE * page_stride + slot % PAGE_SIZE * slot_stride + wide * head_stride + dim[None, :]
        tl.store(keys + to, first.to(keys.dtype.element_ty), mask=mask)
        tl.store(keys + to + HALF, second.to(keys.dtype.element_ty), mask=mask)
        value += token * value_stride
        at = wide * value_head_stride + dim[None, :]
        tl.store(values + to, tl.load(value + at, mask=mask, other=0.0).to(values.dtype.element_ty), mask=mask)
        last = tl.load(value + at + HALF, mask=mask, other=0.0)
        tl.store(values + to + HALF, last.to(values.dtype.element_ty), mask=mask)


def launches(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    kv_pages: Tensor,
    slot_mapping: Tensor,
    layer: int,
) -> tuple[Tensor, list[Launch]]:
    """The rotated query, and what computes it and writes the pages."""
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[1]
    rotated = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    cells = kv_pages[:, layer]
    pointers: dict[str, Argument] = {"query": query, "key": key, "value": value, "rotated": rotated}
    pointers |= {"keys": cells[:, 0], "values": cells[:, 1], "cos_sin": cos_sin}
    pointers |= {"positions": positions, "slot_mapping": slot_mapping}
    page_stride, _, _, slot_stride, head_stride, _ = kv_pages.stride()
    strides: dict[str, Argument] = {"page_stride": page_stride, "slot_stride": slot_stride, "head_stride": head_stride}
    for name, heads in (("query", query), ("key", key), ("value", value)):
        strides |= {f"{name}_stride": heads.stride(0), f"{name}_head_stride": heads.stride(1)}
    half = head_dim // 2
    constants = {"HEADS": num_heads, "KV_HEADS": num_kv_heads, "HALF": half, "PAGE_SIZE": kv_pages.shape[3]}
    constants |= {"BLOCK_HALF": next_power_of_two(half), "BLOCK_H": BLOCK_H}
    grid = num_tokens, ceil_div(num_heads, BLOCK_H) + ceil_div(num_kv_heads, BLOCK_H)
    return rotated, [Launch(store_kv_kernel, grid, pointers | strides, constants, num_warps=4)]


def store_kv_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    kv_pages: Tensor,
    slot_mapping: Tensor,
    layer: int,
) -> Tensor:
    rotated, work = launches(query, key, value, cos_sin, positions, kv_pages, slot_mapping, layer)
    run_all(work)
    return rotated
