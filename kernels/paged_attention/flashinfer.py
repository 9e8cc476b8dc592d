"""FlashInfer behind the seam, for prompts on GPUs where it is installed. It has never run with this code on a device.

Its plan reads lengths on the host: it gets them there, and does not wait for the device. Decodes run in captured
graphs, where nothing can be planned, so they are not for it.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kernels.paged_attention.libraries import HostIndices

WORKSPACE_BYTES = 128 << 20
DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 128, 256)


def refusal(dtype: torch.dtype, page_size: int, head_dim: int) -> str:
    """Why such pages are not for it; empty = they are. Any page size will do."""
    if dtype not in DTYPES:
        return f"flashinfer takes bfloat16 and float16, and the model runs in {str(dtype).removeprefix('torch.')}"
    if head_dim not in HEAD_DIMS:
        return f"flashinfer takes heads of 64, 128 or 256 elements, and the model's have {head_dim}"
    return ""


class _Plans:
    """One plan a step and sliding window; the layers share it.

    A plan is written into pinned memory of its wrapper and copied from there behind what is launched already. A step is
    launched while the one before runs, so that wrappers take turns: the one that planned two steps ago has been read.
    """

    def __init__(self, device: torch.device) -> None:
        self._workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._host: HostIndices | None = None
        self._turn = 0
        # By turn and window; those that are planned for the step.
        self._wrappers: dict[tuple[int, int], Any] = {}
        self._planned: dict[int, Any] = {}

    def wrapper(self, host: "HostIndices", window: int) -> tuple[Any, bool]:
        """The wrapper of a step and window, and whether it is planned already."""
        if host is not self._host:
            self._host, self._turn, self._planned = host, 1 - self._turn, {}
        if window in self._planned:
            return self._planned[window], True
        wrapper = self._wrappers.get((self._turn, window))
        if wrapper is None:
            from flashinfer import BatchPrefillWithPagedKVCacheWrapper

            wrapper = BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD")
            self._wrappers[self._turn, window] = wrapper
        self._planned[window] = wrapper
        return wrapper, False


_plans: dict[torch.device, _Plans] = {}


def page_lists(page_table: Tensor, context_lens: Tensor, page_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(indptr `[num_sequences + 1]`, page ids one sequence behind the other, tokens in each last page), int32."""
    counts = (context_lens + page_size - 1) // page_size
    indptr = torch.zeros(len(counts) + 1, dtype=torch.int32)
    indptr[1:] = counts.cumsum(0)
    used = torch.arange(page_table.shape[1]) < counts[:, None]
    return indptr, page_table[used], context_lens - (counts - 1) * page_size


def _uploaded(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def paged_attention_flashinfer(
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
    """Raises ValueError without `host`: what lies on the device is not read."""
    if host is None:
        raise ValueError("FlashInfer plans with indices on the host, and there are none")
    plans = _plans.get(query.device)
    if plans is None:
        plans = _plans[query.device] = _Plans(query.device)
    wrapper, is_planned = plans.wrapper(host, sliding_window)
    if not is_planned:
        indptr, pages, last_page_lens = page_lists(host.page_table, host.context_lens, kv_pages.shape[3])
        wrapper.plan(
            host.query_start,
            indptr,
            _uploaded(pages, query.device),
            last_page_lens,
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
    out: Tensor = wrapper.run(query.contiguous(), (kv_pages[:, layer, 0], kv_pages[:, layer, 1]))
    return out
