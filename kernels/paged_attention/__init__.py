"""paged_attention: causal attention over keys and values that lie in pages."""

from torch import Tensor

from kernels import dispatch
from kernels.paged_attention import cpu, libraries
from kernels.paged_attention.libraries import HostIndices
from kernels.paged_attention.reference import paged_attention_reference


def paged_attention(
    query: Tensor,
    kv_pages: Tensor,
    page_table: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    layer: int,
    scale: float,
    sliding_window: int = 0,
    *,
    decode_only: bool = False,
    host: HostIndices | None = None,
) -> Tensor:
    """Attention of each sequence's newest tokens over its whole context; decodes and prefill chunks may be mixed.

    query: `[num_tokens, num_heads, head_dim]`, sequence by sequence.
    kv_pages: `[num_pages, num_layers, 2, page_size, num_kv_heads, head_dim]`, any strides, already holding this step's
    tokens; query head h reads KV head h // (num_heads / num_kv_heads).
    page_table: `[num_sequences, max_pages]` int32. query_start: `[num_sequences + 1]` int32.
    context_lens: `[num_sequences]` int32, tokens including this step's. The query tokens are the last of the context.
    sliding_window: a token sees itself and the sliding_window - 1 before it; 0 = all before it.
    decode_only: the caller knows that no sequence has more than one query token; on a GPU that saves a launch.
    host: the three indices on the CPU, of a batch on a GPU; without them no library takes prompts.
    Returns `[num_tokens, num_heads, head_dim]` in the query's dtype, rounded once from float32.
    """
    if query.is_cuda and (attend := libraries.choose(query, kv_pages, host, decode_only=decode_only)):
        return attend(query, kv_pages, page_table, query_start, context_lens, layer, scale, sliding_window, host)
    if dispatch.use_triton("paged_attention", query):
        from kernels.paged_attention.triton import paged_attention_triton

        return paged_attention_triton(
            query, kv_pages, page_table, query_start, context_lens, layer, scale, sliding_window, decode_only
        )
    if dispatch.use_cpu("paged_attention", cpu.supports(query, kv_pages, page_table, query_start, context_lens)):
        return cpu.paged_attention_cpu(
            query, kv_pages, page_table, query_start, context_lens, layer, scale, sliding_window
        )
    return paged_attention_reference(
        query, kv_pages, page_table, query_start, context_lens, layer, scale, sliding_window
    )
