"""Which library computes attention on a GPU: the first that is installed and takes the batch, else Triton does.

LORAPLEX_ATTENTION names one ("flash_attn", "flashinfer") or none ("triton"). They round the weights of the softmax to
the dtype of the pages, so their error is larger than the bound of our kernels' tests, and `deterministic` uses none.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kernels import dispatch
from kernels.gpu import tiles
from kernels.paged_attention import flash_attn, flashinfer


@dataclass(frozen=True, slots=True, eq=False)
class HostIndices:
    """A batch's indices on the CPU, as they were before they went to the device: a plan waits for nobody.

    Shapes and types are those of `paged_attention`.
    """

    page_table: Tensor
    query_start: Tensor
    context_lens: Tensor


class Attend(Protocol):
    """`paged_attention` with the indices both on the device and on the host; only decodes may go without these."""

    def __call__(
        self,
        query: Tensor,
        kv_pages: Tensor,
        page_table: Tensor,
        query_start: Tensor,
        context_lens: Tensor,
        layer: int,
        scale: float,
        sliding_window: int,
        host: HostIndices | None,
    ) -> Tensor: ...


# (dtype, page_size, head_dim) -> why the library does not take such pages; empty = it does.
Refusal = Callable[[torch.dtype, int, int], str]

_REFUSALS: dict[str, Refusal] = {"flash_attn": flash_attn.refusal, "flashinfer": flashinfer.refusal}
_ATTENDS: dict[str, Attend] = {
    "flash_attn": flash_attn.paged_attention_flash_attn,
    "flashinfer": flashinfer.paged_attention_flashinfer,
}


def refusals(dtype: torch.dtype, page_size: int, head_dim: int) -> Iterator[str]:
    """A sentence for each library that is installed and not used with such pages.

    Raises ValueError with the sentence when it is the one that LORAPLEX_ATTENTION names.
    """
    named = dispatch.attention()
    if named in _REFUSALS and not dispatch.installed(named):
        raise ValueError(f"LORAPLEX_ATTENTION is {named!r}, and {named} is not installed")
    for library in dispatch.attention_libraries():
        sentence = _REFUSALS[library](dtype, page_size, head_dim)
        if tiles.is_deterministic():
            sentence = f"{library} gives a token other bits in another batch, and --deterministic does not allow that"
        if sentence and library == named:
            raise ValueError(f"LORAPLEX_ATTENTION is {named!r}: {sentence}")
        if sentence:
            yield sentence


def choose(query: Tensor, kv_pages: Tensor, host: HostIndices | None, *, decode_only: bool) -> Attend | None:
    """None = no library takes this batch."""
    if tiles.is_deterministic() or query.dtype != kv_pages.dtype:
        return None
    for library in dispatch.attention_libraries():
        if _REFUSALS[library](query.dtype, kv_pages.shape[3], query.shape[2]):
            continue
        # FlashInfer plans on the host, which a captured graph cannot do: decodes are not for it.
        if (host is None or decode_only) if library == "flashinfer" else (host is None and not decode_only):
            continue
        dispatch.calls["paged_attention", library] += 1
        return _ATTENDS[library]
    return None
