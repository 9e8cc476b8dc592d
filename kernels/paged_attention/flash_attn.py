"""FlashAttention 2 behind the seam, on GPUs where it is installed. It has never run with this code on a device.

Decodes go to `flash_attn_with_kvcache`, one query token a sequence, also in a captured graph: it reads the lengths on
the device. Prompts, beside decodes or not, go to `flash_attn_varlen_func`, which wants the two largest lengths as
numbers; they come from the host.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kernels.paged_attention.libraries import HostIndices

PAGE_TOKENS = 256
MAX_HEAD_DIM, HEAD_DIM_MULTIPLE = 256, 8
DTYPES = (torch.bfloat16, torch.float16)


def refusal(dtype: torch.dtype, page_size: int, head_dim: int) -> str:
    """Why such pages are not for it, and what to do; empty = they are."""
    if dtype not in DTYPES:
        return f"flash_attn takes bfloat16 and float16, and the model runs in {str(dtype).removeprefix('torch.')}"
    if head_dim > MAX_HEAD_DIM or head_dim % HEAD_DIM_MULTIPLE:
        return f"flash_attn takes heads of a multiple of 8 up to 256 elements, and the model's have {head_dim}"
    if page_size % PAGE_TOKENS:
        return f"flash_attn takes pages of a multiple of 256 tokens, and these have {page_size}: set --page-size 256"
    return ""


def paged_attention_flash_attn(
    query: Tensor,
    kv_pages: Tensor,
    page_table: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    layer: int,
    scale: float,
    sliding_window: int,
    host: "HostIndices | None",
) -> Tensor:
    """`host` None = every sequence has exactly one query token."""
    from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

    key, value = kv_pages[:, layer, 0], kv_pages[:, layer, 1]
    # theirs does not count the token itself; -1 = all before it
    window = (sliding_window - 1, 0) if sliding_window else (-1, -1)
    out: Tensor
    if host is None or len(query) == len(context_lens) == int(host.query_start.diff().count_nonzero()):
        out = flash_attn_with_kvcache(
            query[:, None],
            key,
            value,
            cache_seqlens=context_lens,
            block_table=page_table,
            softmax_scale=scale,
            causal=True,
            window_size=window,
        )
        return out[:, 0]
    key_start = torch.zeros_like(query_start)
    torch.cumsum(context_lens, 0, dtype=torch.int32, out=key_start[1:])
    out = flash_attn_varlen_func(
        query,
        key,
        value,
        cu_seqlens_q=query_start,
        cu_seqlens_k=key_start,
        max_seqlen_q=int(host.query_start.diff().max()),
        max_seqlen_k=int(host.context_lens.max()),
        softmax_scale=scale,
        causal=True,
        window_size=window,
        block_table=page_table,
    )
    return out
