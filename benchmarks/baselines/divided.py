"""Memory that is divided for good: one part for KV, the other for adapters, whoever needs more.

`Divided` gives each adapter the pages its bytes take. `Slotted` gives each a slot as large as an adapter of the largest
rank on every module: what vLLM reserves with `max_loras` and `max_lora_rank`.
"""

from common.packing import PackedLayout
from gpu_worker.memory.manager import MemoryManager, SharedPrefix


class Divided(MemoryManager):
    """The whole pool is KV's part and the adapters' part; neither lends to the other."""

    # Pages for adapters, set by whoever builds the engine.
    adapter_pages: int

    def admit(
        self,
        sequence_id: str,
        num_tokens: int,
        adapter_version: str,
        layout: PackedLayout | None,
        shared: SharedPrefix | None = None,
    ) -> bool:
        new = layout is not None and self.adapters.get(adapter_version) is None
        if not self._kv_fits(self.geometry.pages_for_tokens(num_tokens)):
            return False
        if new and layout is not None and not self._take_adapter(layout):
            return False
        return super().admit(sequence_id, num_tokens, adapter_version, layout, shared)

    def grow(self, sequence_id: str, num_tokens: int) -> bool:
        missing = self.kv.missing_pages(sequence_id, num_tokens)
        return (not missing or self._kv_fits(missing)) and super().grow(sequence_id, num_tokens)

    def _kv_fits(self, num_pages: int) -> bool:
        return self.counts().kv + num_pages <= self.num_pages - self.adapter_pages

    def _take_adapter(self, layout: PackedLayout) -> bool:
        """Evicts the adapters used least recently until the new one has room in the adapters' part."""
        while not self._adapter_fits(layout):
            cold = next(iter(self.adapters.evictable()), None)
            if cold is None:
                return False
            self.evict(cold.adapter_version)
            self.evictions += 1
        return True

    def _adapter_fits(self, layout: PackedLayout) -> bool:
        counts = self.counts()
        taken = counts.adapters + counts.loading
        return taken + self.geometry.pages_for_bytes(layout.total_bytes) <= self.adapter_pages


class Slotted(Divided):
    """As many adapters as there are slots, however small they are."""

    # Pages of an adapter of the largest rank on every module.
    slot_pages: int

    def _adapter_fits(self, layout: PackedLayout) -> bool:
        return sum(1 for _ in self.adapters) < self.adapter_pages // self.slot_pages
