"""Stand-ins for attention libraries that need a GPU: each checks what it is given as its documentation has it, and
computes in float64."""

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from kernels import dispatch


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int) -> Tensor:
    """One sequence in float64: `query [q, heads, dim]` are the last of `key`, `value [context, kv_heads, dim]`.

    window: how many before itself a token sees; negative = all.
    """
    group = query.shape[1] // key.shape[1]
    k, v = (side.double().repeat_interleave(group, dim=1) for side in (key, value))
    position = torch.arange(len(key) - len(query), len(key))[:, None]
    distance = position - torch.arange(len(key))
    hidden = (distance < 0) | ((distance > window) if window >= 0 else torch.zeros_like(distance, dtype=torch.bool))
    scores = torch.einsum("qhd,khd->hqk", query.double(), k) * scale
    weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, v).to(query.dtype)


def gathered(cache: Tensor, pages: Tensor, context: int) -> Tensor:
    """`[context, kv_heads, dim]` of `cache [num_pages, page_size, kv_heads, dim]`."""
    return cache[pages[: -(-context // cache.shape[1])].long()].flatten(0, 1)[:context]


def check_cache(cache: Tensor, block_table: Tensor) -> None:
    """FlashAttention's own checks of a paged cache."""
    assert cache.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256"
    assert cache.stride(-1) == 1
    assert cache.shape[-1] % 8 == 0
    assert block_table.dtype == torch.int32
    assert block_table.stride(-1) == 1


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor:
    """`q [batch, new, heads, dim]`; the query tokens are the last of each sequence's `cache_seqlens`."""
    assert block_table is not None
    assert cache_seqlens is not None
    assert softmax_scale is not None
    assert cache_seqlens.dtype == torch.int32
    assert causal
    assert window_size[1] == (0 if window_size[0] >= 0 else -1)
    assert q.shape[0] == len(cache_seqlens) == len(block_table)
    assert q.dtype == k_cache.dtype == v_cache.dtype
    for cache in (k_cache, v_cache):
        check_cache(cache, block_table)
    rows = [
        attend(row, gathered(k_cache, pages, context), gathered(v_cache, pages, context), softmax_scale, window_size[0])
        for row, pages, context in zip(q, block_table, cache_seqlens.tolist(), strict=True)
    ]
    return torch.stack(rows)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """`q [tokens, heads, dim]`; lengths beyond the two largest would not be computed by the real one."""
    assert block_table is not None
    assert softmax_scale is not None
    assert causal
    assert window_size[1] == (0 if window_size[0] >= 0 else -1)
    assert (cu_seqlens_q.dtype, cu_seqlens_k.dtype) == (torch.int32, torch.int32)
    assert len(cu_seqlens_q) == len(cu_seqlens_k) == len(block_table) + 1
    assert (type(max_seqlen_q), type(max_seqlen_k)) == (int, int)
    assert max_seqlen_q == int(cu_seqlens_q.diff().max())
    assert max_seqlen_k == int(cu_seqlens_k.diff().max())
    for cache in (k, v):
        check_cache(cache, block_table)
    starts = cu_seqlens_q.tolist()
    contexts = cu_seqlens_k.diff().tolist()
    rows = [
        attend(q[start:end], gathered(k, pages, context), gathered(v, pages, context), softmax_scale, window_size[0])
        for start, end, pages, context in zip(starts, starts[1:], block_table, contexts, strict=False)
    ]
    return torch.cat(rows)


def install(monkeypatch: pytest.MonkeyPatch, name: str, **contents: object) -> None:
    """A module of that name, for `import` and for those who ask whether it is there."""
    module = ModuleType(name)
    for key, value in contents.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)
    there = dispatch.installed
    monkeypatch.setattr(dispatch, "installed", lambda package: package == name or there(package))
