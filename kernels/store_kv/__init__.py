"""store_kv: rotary position embedding, and this step's keys and values into their pages."""

from torch import Tensor

from kernels import dispatch
from kernels.store_kv import cpu
from kernels.store_kv.reference import store_kv_reference


def store_kv(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    kv_pages: Tensor,
    slot_mapping: Tensor,
    layer: int,
) -> Tensor:
    """Rotates query and key by their positions and writes key and value into their slots of one layer.

    query: `[num_tokens, num_heads, head_dim]`; key, value: `[num_tokens, num_kv_heads, head_dim]`; any strides.
    cos_sin: `[max_positions, 2, head_dim / 2]` float32, 0 = cosine, 1 = sine. positions: `[num_tokens]` int64.
    kv_pages: `[num_pages, num_layers, 2, page_size, num_kv_heads, head_dim]`, any strides; written in place.
    slot_mapping: `[num_tokens]` int64, page * page_size + offset, no slot twice.
    Returns the rotated query `[num_tokens, num_heads, head_dim]` in its dtype; rotation is float32, rounded once.
    """
    if dispatch.use_triton("store_kv", query):
        from kernels.store_kv.triton import store_kv_triton

        return store_kv_triton(query, key, value, cos_sin, positions, kv_pages, slot_mapping, layer)
    if dispatch.use_cpu("store_kv", cpu.supports(query, key, value, cos_sin, positions, kv_pages, slot_mapping)):
        return cpu.store_kv_cpu(query, key, value, cos_sin, positions, kv_pages, slot_mapping, layer)
    return store_kv_reference(query, key, value, cos_sin, positions, kv_pages, slot_mapping, layer)
