"""Memory that is divided for good: one part for KV, the other for adapters, whoever needs more.

`Divided` gives each adapter the pages its bytes take. `Slotted` gives each a slot as large as an adapter of the largest
rank on every module: what vLLM reserves with `max_loras` and `max_lora_rank`. Each part evicts by the product's own
policy, its own things only.
"""

from collections.abc import Collection, Sequence

from common.packing import PackedLayout
from gpu_worker.memory.adapter_cache import AdapterCache, ResidentAdapter
from gpu_worker.memory.eviction import EvictionQueue, LeastWorth
from gpu_worker.memory.geometry import PageGeometry
from gpu_worker.memory.manager import MemoryManager
from gpu_worker.memory.prefix_cache import PrefixPage


class Divided(MemoryManager):
    """The whole pool is KV's part and the adapters' part; neither lends to the other."""

    # Pages for adapters, set by whoever builds the engine.
    adapter_pages: int

    def __init__(self, geometry: PageGeometry, num_pages: int) -> None:
        super().__init__(geometry, num_pages)
        self._cold_adapters = EvictionQueue(LeastWorth())
        self.adapters = AdapterCache(geometry, self._allocator, self._cold_adapters, self.costs, self.demand)

    def admit(
        self,
        sequence_id: str,
        num_tokens: int,
        adapter_version: str,
        layout: PackedLayout | None,
        keys: Sequence[bytes] = (),
    ) -> bool:
        cached = self.prefixes.match(keys)
        num_pages = self.geometry.pages_for_tokens(num_tokens) - len(cached)
        kept = sum(page.evictable for page in cached)
        if num_pages > self._kv_room() + self._queue.evictable_pages - kept:
            return False
        adapter = self.adapters.get(adapter_version) if layout else None
        if layout and adapter is None:
            if not self._make_adapter_room(layout):
                return False
            adapter = self.adapters.add_loading(adapter_version, layout)
        if adapter:
            self.adapters.acquire(adapter)
        self.kv.start(sequence_id, cached)
        self.prefixes.passed(self.demand.admitted(adapter_version))
        self._make_room(num_pages)
        self.kv.extend(sequence_id, num_pages)
        return True

    def prefetch(
        self,
        adapter_version: str,
        layout: PackedLayout,
        *,
        keep: Collection[str] | None = None,
        spare_pages: int = 0,
    ) -> bool:
        """While the adapters' part has room; what is in it stays."""
        if self.adapters.get(adapter_version) or not self._adapter_fits(layout):
            return False
        self.adapters.add_loading(adapter_version, layout)
        self.demand.foresee(adapter_version)
        return True

    def complete(self, step: int) -> None:
        super().complete(step)
        self._cold_adapters.complete(step)

    @property
    def evictable_pages(self) -> int:
        return super().evictable_pages + self._cold_adapters.evictable_pages

    def check_integrity(self) -> None:
        self._allocator.check_integrity(self._owned())
        self.prefixes.check_integrity(self.kv.prefixes())
        self._queue.check_integrity(list(self.prefixes))
        self._cold_adapters.check_integrity(list(self.adapters))

    def _kv_room(self) -> int:
        counts = self.counts()
        return min(counts.free, self.num_pages - self.adapter_pages - counts.kv - counts.prefix)

    def _make_room(self, num_pages: int) -> bool:
        """In KV's part."""
        if num_pages > self._kv_room() + self._queue.evictable_pages:
            return False
        while num_pages > self._kv_room():
            victim = self._queue.pop()
            assert isinstance(victim, PrefixPage)
            self.prefixes.evict(victim)
            self.prefix_evictions += 1
        return True

    def _make_adapter_room(self, layout: PackedLayout) -> bool:
        """In the adapters' part."""
        while not self._adapter_fits(layout):
            if not self._cold_adapters.evictable_pages:
                return False
            victim = self._cold_adapters.pop()
            assert isinstance(victim, ResidentAdapter)
            self.evict(victim.adapter_version)
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
        return len(self.adapters) < self.adapter_pages // self.slot_pages
