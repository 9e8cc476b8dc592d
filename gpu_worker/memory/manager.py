"""The façade of the memory manager. Its calls are applied by the engine between steps, from one thread."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from common.packing import PackedLayout
from gpu_worker.memory.adapter_cache import AdapterCache, AdapterInUseError, ResidentAdapter
from gpu_worker.memory.allocator import PageAllocator, PageCounts, PageKind
from gpu_worker.memory.costs import CostModel
from gpu_worker.memory.demand import Demand
from gpu_worker.memory.eviction import EvictionPolicy, EvictionQueue, LeastWorth
from gpu_worker.memory.geometry import PageGeometry
from gpu_worker.memory.kv_cache import KVCache
from gpu_worker.memory.prefix_cache import PrefixCache, PrefixPage


@dataclass(frozen=True, slots=True)
class ResidencyChange:
    """An adapter came into pages or left them. `sequence` has no gaps."""

    sequence: int
    adapter_version: str
    resident: bool
    num_pages: int


class MemoryManager:
    """Pages of one pool, shared by running sequences, cached prefixes and resident adapters.

    What running sequences hold and the adapters they use are pinned. Cold adapters and unreferenced prefix pages yield,
    in the order of one policy.
    """

    def __init__(self, geometry: PageGeometry, num_pages: int, policy: EvictionPolicy | None = None) -> None:
        self.geometry = geometry
        self.num_pages = num_pages
        self.costs = CostModel()
        self.demand = Demand()
        self._queue = EvictionQueue(policy or LeastWorth())
        self._allocator = PageAllocator(num_pages)
        self.prefixes = PrefixCache(self._allocator, self._queue, self.costs, self.demand, geometry.page_size)
        self.kv = KVCache(geometry, self._allocator, self.prefixes)
        self.adapters = AdapterCache(geometry, self._allocator, self._queue, self.costs, self.demand)
        self._changes: list[ResidencyChange] = []
        self._change_sequence = 0
        # Adapters and prefix pages whose pages were taken.
        self.evictions = 0
        self.prefix_evictions = 0

    def cached_tokens(self, keys: Sequence[bytes]) -> int:
        """Tokens of a sequence with these prefix keys whose KV is in pages."""
        return len(self.prefixes.match(keys)) * self.geometry.page_size

    def admit(
        self,
        sequence_id: str,
        num_tokens: int,
        adapter_version: str,
        layout: PackedLayout | None,
        keys: Sequence[bytes] = (),
    ) -> bool:
        """Reserves KV for `num_tokens` and the adapter's pages, both or nothing, and pins the adapter.

        `layout` is that of the adapter; None with an empty `adapter_version` means the base model. The sequence begins
        with the cached pages that `keys` name, `cached_tokens(keys)` in all, at most as many as `num_tokens` take.
        False when even evicting whatever can be evicted would not make room.
        """
        cached = self.prefixes.match(keys)
        resident = self.adapters.get(adapter_version) if layout else None
        num_pages = need = self.geometry.pages_for_tokens(num_tokens) - len(cached)
        if layout and resident is None:
            need += self.geometry.pages_for_bytes(layout.total_bytes)
        # What the sequence itself is about to hold cannot be evicted for it.
        kept = sum(page.evictable for page in cached)
        if resident and resident.evictable:
            kept += resident.num_pages
        if need > self._allocator.num_free + self._queue.evictable_pages - kept:
            return False
        self.kv.start(sequence_id, cached)
        self.prefixes.passed(self.demand.admitted(adapter_version))
        if resident:
            self.adapters.acquire(resident)
        self._make_room(need)
        self.kv.extend(sequence_id, num_pages)
        if layout and resident is None:
            self.adapters.acquire(self.adapters.add_loading(adapter_version, layout))
        return True

    def prefetch(
        self,
        adapter_version: str,
        layout: PackedLayout,
        *,
        keep: Collection[str] | None = None,
        spare_pages: int = 0,
    ) -> bool:
        """Reserves pages for an adapter that no sequence uses yet; the caller then copies it there.

        Only free pages, or with `keep` also what can be evicted, except the adapters it names; `spare_pages` stay free.
        False, with nothing taken, when that does not suffice or the adapter is here already.
        """
        need = self.geometry.pages_for_bytes(layout.total_bytes) + spare_pages
        if self.adapters.get(adapter_version):
            return False
        if need > self._allocator.num_free and (keep is None or not self._make_room_beside(need, keep)):
            return False
        self.adapters.add_loading(adapter_version, layout)
        self.demand.foresee(adapter_version)
        return True

    def grow(self, sequence_id: str, num_tokens: int) -> bool:
        """Makes room for `num_tokens` of an admitted sequence; False, with nothing taken, when pages are short."""
        missing = num_tokens - self.kv.room(sequence_id)
        if missing <= 0:
            return True
        num_pages = self.geometry.pages_for_tokens(missing)
        if not self._make_room(num_pages):
            return False
        self.kv.extend(sequence_id, num_pages)
        return True

    def publish(self, sequence_id: str, keys: Sequence[bytes]) -> None:
        """The first pages of an admitted sequence, one for each key, are full and computed: others may share them."""
        self.kv.publish(sequence_id, keys)

    def release(self, sequence_id: str, adapter_version: str, last_step: int, *, returning: bool = False) -> None:
        """Ends an admission: full pages stay as prefix pages and the adapter as a cold one until pages are needed.

        `returning`: the sequence was preempted and will want its pages again.
        """
        self.kv.release(sequence_id, last_step, returning=returning, adapter_version=adapter_version)
        if adapter := self.adapters.get(adapter_version):
            self.adapters.release(adapter)

    def finish_loading(self, adapter_version: str, seconds: float = 0.0) -> None:
        """The adapter's bytes are in its pages; bringing them there took `seconds`, 0 when that was not measured."""
        adapter = self.adapters.get(adapter_version)
        if adapter and seconds:
            self.costs.loaded(adapter_version, adapter.layout.total_bytes, seconds)
        self._record(self.adapters.finish_loading(adapter_version), resident=True)

    def drop_failed(self, adapter_version: str) -> None:
        """Frees the pages of an adapter that could not be loaded; its sequences must have been released."""
        self.adapters.remove(adapter_version)

    def evict(self, adapter_version: str) -> int:
        """Frees an adapter's pages and returns how many. Raises KeyError if unknown, AdapterInUseError if in use."""
        adapter = self.adapters.get(adapter_version)
        if adapter is None:
            raise KeyError(adapter_version)
        if adapter.loading:
            raise AdapterInUseError("the adapter is being loaded")
        self.adapters.remove(adapter_version)
        self._record(adapter, resident=False)
        return adapter.num_pages

    def complete(self, step: int) -> None:
        """Launched step `step` has completed: its quarantined pages are free, what it touched last is evictable."""
        self._allocator.complete(step)
        self._queue.complete(step)

    def counts(self) -> PageCounts:
        return self._allocator.counts()

    @property
    def evictable_pages(self) -> int:
        """Pages of cold adapters and unreferenced prefixes that no step in flight touches."""
        return self._queue.evictable_pages

    def take_changes(self) -> list[ResidencyChange]:
        """Changes of residency since the last call."""
        changes, self._changes = self._changes, []
        return changes

    def check_integrity(self) -> None:
        """Raises IntegrityError unless free + quarantined + loading + kv + prefix + adapters = all, one owner each."""
        self._allocator.check_integrity(self._owned())
        self.prefixes.check_integrity(self.kv.prefixes())
        self._queue.check_integrity([*self.adapters, *self.prefixes])

    def _owned(self) -> Iterator[tuple[PageKind, list[int]]]:
        yield PageKind.KV, list(self.kv.own_pages())
        for page in self.prefixes:
            yield (PageKind.KV if page.references else PageKind.PREFIX), [page.page]
        for adapter in self.adapters:
            yield (PageKind.LOADING if adapter.loading else PageKind.ADAPTER), adapter.pages

    def _make_room(self, num_pages: int) -> bool:
        """Evicts until `num_pages` are free; nothing when that cannot suffice."""
        if num_pages > self._allocator.num_free + self._queue.evictable_pages:
            return False
        while num_pages > self._allocator.num_free:
            victim = self._queue.pop()
            if isinstance(victim, ResidentAdapter):
                self.evict(victim.adapter_version)
                self.evictions += 1
            elif isinstance(victim, PrefixPage):
                self.prefixes.evict(victim)
                self.prefix_evictions += 1
        return True

    def _make_room_beside(self, num_pages: int, keep: Collection[str]) -> bool:
        """`_make_room` that leaves the adapters of `keep` where they are."""
        named = (self.adapters.get(adapter_version) for adapter_version in keep)
        kept = [adapter for adapter in named if adapter and adapter.evictable]
        kept_pages = sum(adapter.num_pages for adapter in kept)
        if num_pages > self._allocator.num_free + self._queue.evictable_pages - kept_pages:
            return False
        for adapter in kept:
            self._queue.discard(adapter)
        self._make_room(num_pages)
        for adapter in kept:
            self._queue.restore(adapter)
        return True

    def _record(self, adapter: ResidentAdapter, *, resident: bool) -> None:
        self._change_sequence += 1
        self._changes.append(
            ResidencyChange(self._change_sequence, adapter.adapter_version, resident, adapter.num_pages)
        )
