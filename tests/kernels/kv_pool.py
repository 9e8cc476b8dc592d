"""Keys and values scattered over permuted pages; every slot without a token is NaN."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NUM_LAYERS = 2


@dataclass(frozen=True, slots=True)
class PagedContexts:
    """`keys[s]`, `values[s]`: `[context, num_kv_heads, head_dim]` of sequence s, also in `kv_pages` at `layer`."""

    kv_pages: Tensor
    page_table: Tensor
    context_lens: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    layer: int = 1


def empty_pages(num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """`[num_pages, num_layers, 2, page_size, num_kv_heads, head_dim]` of NaN with a gap behind each page."""
    shape = NUM_LAYERS, 2, page_size, num_kv_heads, head_dim
    page_elements = torch.Size(shape).numel()
    storage = torch.full((num_pages, page_elements + 64), torch.nan, dtype=dtype)
    return storage[:, :page_elements].view(num_pages, *shape)


def scatter(
    context_lens: Sequence[int],
    page_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> PagedContexts:
    counts = [-(-context // page_size) for context in context_lens]
    num_pages = sum(counts) + 2
    pages = torch.randperm(num_pages, generator=generator).split_with_sizes([*counts, 2])
    paged = PagedContexts(
        kv_pages=empty_pages(num_pages, page_size, num_kv_heads, head_dim, dtype),
        # an entry behind the last page points outside the pool: reading it is an error
        page_table=torch.full((len(counts), max(counts)), num_pages, dtype=torch.int32),
        context_lens=torch.tensor(context_lens, dtype=torch.int32),
        keys=[],
        values=[],
    )
    for sequence, context in enumerate(context_lens):
        paged.page_table[sequence, : counts[sequence]] = pages[sequence]
        both = torch.randn(2, context, num_kv_heads, head_dim, generator=generator).to(dtype)
        paged.keys.append(both[0])
        paged.values.append(both[1])
        for position in range(context):
            page, offset = pages[sequence][position // page_size], position % page_size
            paged.kv_pages[page, paged.layer, :, offset] = both[:, position]
    return paged
