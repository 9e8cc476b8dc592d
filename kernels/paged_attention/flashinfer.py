"""FlashInfer behind the seam, for prompts on GPUs where it is installed. It has never run with this code on a device.

Its plan wants the lengths on the host, which is one wait for the device a step (the layers share the plan); so decodes,
which run in captured graphs, stay with Triton. It rounds the weights of the softmax to the dtype of the pages, so its
error is larger than the bound of our kernels' tests, and `deterministic` does not use it.
"""

import torch
from torch import Tensor

from kernels.gpu import tiles

WORKSPACE_BYTES = 128 << 20
DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 128, 256)


class _Planned:
    """The wrapper, and the batch that it is planned for: the tensors of a step, which its layers share."""

    def __init__(self, device: torch.device) -> None:
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper

        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self.wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        self.batch: tuple[Tensor, Tensor, int] | None = None


_planned: dict[torch.device, _Planned] = {}


def supports(query: Tensor, kv_pages: Tensor, *, decode_only: bool) -> bool:
    fits = query.dtype in DTYPES and kv_pages.dtype == query.dtype and query.shape[2] in HEAD_DIMS
    return fits and not decode_only and not tiles.is_deterministic()


def page_lists(page_table: Tensor, context_lens: Tensor, page_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(indptr `[num_sequences + 1]`, page ids one sequence behind the other, tokens in each last page), int32."""
    counts = (context_lens + page_size - 1) // page_size
    indptr = torch.zeros(len(counts) + 1, dtype=torch.int32, device=counts.device)
    indptr[1:] = counts.cumsum(0)
    used = torch.arange(page_table.shape[1], device=counts.device) < counts[:, None]
    return indptr, page_table[used], context_lens - (counts - 1) * page_size


def paged_attention_flashinfer(
    query: Tensor,
    kv_pages: Tensor,
    page_table: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    layer: int,
    scale: float,
    sliding_window: int,
) -> Tensor:
    planned = _planned.get(query.device)
    if planned is None:
        planned = _planned[query.device] = _Planned(query.device)
    batch = planned.batch
    if batch is None or batch[0] is not query_start or batch[1] is not page_table or batch[2] != sliding_window:
        planned.wrapper.plan(
            query_start,
            *page_lists(page_table, context_lens, kv_pages.shape[3]),
            num_qo_heads=query.shape[1],
            num_kv_heads=kv_pages.shape[4],
            head_dim_qk=query.shape[2],
            page_size=kv_pages.shape[3],
            causal=True,
            sm_scale=scale,
            # theirs does not count the token itself; -1 = all before it
            window_left=sliding_window - 1,
            q_data_type=query.dtype,
            kv_data_type=kv_pages.dtype,
        )
        planned.batch = query_start, page_table, sliding_window
    out: Tensor = planned.wrapper.run(query.contiguous(), (kv_pages[:, layer, 0], kv_pages[:, layer, 1]))
    return out
