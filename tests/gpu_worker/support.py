"""Plain values that the tests of the worker share."""

from common.packing import PackedLayout
from gpu_worker.memory.geometry import PageGeometry
from gpu_worker.sequence import SamplingParams, Sequence, StoppingParams

# 4 tokens of 256 bytes: 8 units of an adapter's byte string in a page.
SMALL_PAGES = PageGeometry(num_layers=2, num_kv_heads=2, head_dim=8, element_bytes=4, page_size=4)


def layout_of_pages(num_pages: int, geometry: PageGeometry = SMALL_PAGES) -> PackedLayout:
    """An adapter that changes nothing and takes `num_pages` pages, the last one not whole."""
    return PackedLayout("float32", num_pages * geometry.page_bytes - 1, ())


def waiting_sequence(
    name: str,
    num_prompt_tokens: int,
    *,
    max_tokens: int = 8,
    order_key: int = 0,
    adapter_version: str = "",
    gateway_id: str = "gateway",
    first_token: int = 0,
) -> Sequence:
    return Sequence(
        request_id=name,
        attempt=0,
        tenant="default",
        gateway_id=gateway_id,
        order_key=order_key,
        prompt_token_ids=list(range(first_token, first_token + num_prompt_tokens)),
        output_token_ids=[],
        num_delivered=0,
        sampling=SamplingParams(temperature=0.0, seed=0),
        stopping=StoppingParams(max_tokens, 0, frozenset()),
        adapter_version=adapter_version,
    )
