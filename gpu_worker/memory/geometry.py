"""Sizes of a page. The page size is chosen for the KV cache alone; adapters take whatever pages they need."""

from dataclasses import dataclass

from common.packing import UNIT_BYTES


@dataclass(frozen=True, slots=True)
class PageGeometry:
    """One page holds `page_size` tokens of KV over all layers, or any `page_bytes` of an adapter's byte string."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    element_bytes: int
    # tokens
    page_size: int

    @property
    def kv_bytes_per_token(self) -> int:
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * self.element_bytes

    @property
    def page_bytes(self) -> int:
        """KV bytes of a page, rounded up to whole units so that a unit of an adapter never crosses a page."""
        kv_bytes = self.page_size * self.kv_bytes_per_token
        return -(-kv_bytes // UNIT_BYTES) * UNIT_BYTES

    def pages_for_tokens(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def pages_for_bytes(self, num_bytes: int) -> int:
        return -(-num_bytes // self.page_bytes)
