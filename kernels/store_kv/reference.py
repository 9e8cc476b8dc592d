"""Rotary embedding and the write into pages in plain PyTorch: the definition of correct."""

import torch
from torch import Tensor


def store_kv_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    kv_pages: Tensor,
    slot_mapping: Tensor,
    layer: int,
) -> Tensor:
    cos, sin = cos_sin[positions].unsqueeze(2).unbind(1)  # each [num_tokens, 1, head_dim / 2]
    page_size = kv_pages.shape[3]
    page = torch.div(slot_mapping, page_size, rounding_mode="floor")
    offset = slot_mapping - page * page_size
    kv_pages[:, layer, 0][page, offset] = _rotate(key, cos, sin).to(kv_pages.dtype)
    kv_pages[:, layer, 1][page, offset] = value.to(kv_pages.dtype)
    return _rotate(query, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates element i against element i + head_dim / 2: the half-split pairing of transformers' rotate_half."""
    first, second = x.to(torch.float32).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
