"""Attention over pages in plain PyTorch, one sequence after another: the definition of correct."""

import torch
from torch import Tensor


def paged_attention_reference(
    query: Tensor,
    kv_pages: Tensor,
    page_table: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    layer: int,
    scale: float,
    sliding_window: int = 0,
) -> Tensor:
    out = torch.empty_like(query)
    page_size = kv_pages.shape[3]
    key_pages, value_pages = kv_pages[:, layer].unbind(1)  # each [num_pages, page_size, num_kv_heads, head_dim]
    starts, contexts = query_start.tolist(), context_lens.tolist()
    for sequence, context in enumerate(contexts):
        start, end = starts[sequence], starts[sequence + 1]
        if start == end:
            continue
        pages = page_table[sequence, : -(-context // page_size)]
        key, value = (  # each [context, num_kv_heads, head_dim]
            cell.index_select(0, pages).flatten(0, 1)[:context].to(torch.float32) for cell in (key_pages, value_pages)
        )
        out[start:end] = _attend(query[start:end], key, value, scale, sliding_window)
    return out


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float, sliding_window: int) -> Tensor:
    """query: `[q, num_heads, head_dim]`, the context's last q tokens; key, value: `[c, num_kv_heads, head_dim]`."""
    num_queries, num_heads, head_dim = query.shape
    context, num_kv_heads, _ = key.shape
    # the query heads of a KV head become rows of one matrix: [num_kv_heads, group * q, head_dim]
    grouped = query.to(torch.float32).view(num_queries, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3).flatten(1, 2)
    scores = torch.bmm(grouped, key.permute(1, 2, 0)) * scale
    if num_queries > 1 or sliding_window:
        hidden = _hidden(num_queries, context, sliding_window, query.device)
        scores = scores.view(num_kv_heads, -1, num_queries, context).masked_fill(hidden, -torch.inf).flatten(1, 2)
    mixed = torch.bmm(torch.softmax(scores, dim=-1), value.transpose(0, 1))
    return mixed.view(num_heads, num_queries, head_dim).transpose(0, 1).to(query.dtype)


def _hidden(num_queries: int, context: int, sliding_window: int, device: torch.device) -> Tensor:
    """`[num_queries, context]` bool, true where a query token must not look."""
    key_position = torch.arange(context, device=device)
    query_position = key_position[context - num_queries :, None]
    hidden = key_position > query_position
    if sliding_window:
        hidden |= query_position - key_position >= sliding_window
    return hidden
