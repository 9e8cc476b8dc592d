"""The façade of the memory manager. Its calls are applied by the engine between steps, from one thread."""

from collections.abc import Iterator
from dataclasses import dataclass

from common.packing import PackedLayout
from gpu_worker.memory.adapter_cache import AdapterCache, AdapterInUseError, ResidentAdapter
from gpu_worker.memory.allocator import PageAllocator, PageCounts, PageKind
from gpu_worker.memory.geometry import PageGeometry
from gpu_worker.memory.kv_cache import KVCache


@dataclass(frozen=True, slots=True)
class ResidencyChange:
    """An adapter came into pages or left them. `sequence` has no gaps."""

    sequence: int
    adapter_version: str
    resident: bool
    num_pages: int


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """The first `num_tokens` of an admitted sequence, computed, which another begins with too."""

    sequence_id: str
    num_tokens: int


class MemoryManager:
    """Pages of one pool, shared by running sequences and resident adapters.

    Running sequences and the adapters they use are pinned; cold adapters yield, least recently used first.
    """

    def __init__(self, geometry: PageGeometry, num_pages: int) -> None:
        self.geometry = geometry
        self.num_pages = num_pages
        self._allocator = PageAllocator(num_pages)
        self.kv = KVCache(geometry, self._allocator)
        self.adapters = AdapterCache(geometry, self._allocator)
        self._changes: list[ResidencyChange] = []
        self._change_sequence = 0
        self.evictions = 0

    def admit(
        self,
        sequence_id: str,
        num_tokens: int,
        adapter_version: str,
        layout: PackedLayout | None,
        shared: SharedPrefix | None = None,
    ) -> bool:
        """Reserves KV for `num_tokens` and the adapter's pages, both or nothing, and pins the adapter.

        `layout` is that of the adapter; None with an empty `adapter_version` means the base model. The full pages of
        `shared` are taken over instead of allocated. False when even evicting every cold adapter would not make room.
        """
        resident = self.adapters.get(adapter_version) if layout else None
        shared_pages = shared.num_tokens // self.geometry.page_size if shared else 0
        need = max(0, self.geometry.pages_for_tokens(num_tokens) - shared_pages)
        if layout and resident is None:
            need += self.geometry.pages_for_bytes(layout.total_bytes)
        if not self._make_room(need, keep=adapter_version):
            return False
        if shared:
            self.kv.share(shared.sequence_id, sequence_id, shared.num_tokens)
        self.kv.extend(sequence_id, num_tokens)
        if layout:
            adapter = resident or self.adapters.add_loading(adapter_version, layout)
            adapter.sequence_pins += 1
        return True

    def grow(self, sequence_id: str, num_tokens: int) -> bool:
        """Makes room for `num_tokens` of an admitted sequence; False, with nothing taken, when pages are short."""
        if not self._make_room(self.kv.missing_pages(sequence_id, num_tokens)):
            return False
        self.kv.extend(sequence_id, num_tokens)
        return True

    def release(self, sequence_id: str, adapter_version: str, last_step: int) -> None:
        """Frees the sequence's KV and unpins its adapter, which stays resident until its pages are needed."""
        self.kv.release(sequence_id, last_step)
        if adapter := self.adapters.get(adapter_version):
            adapter.sequence_pins -= 1

    def finish_loading(self, adapter_version: str) -> None:
        """The adapter's bytes are in its pages."""
        adapter = self.adapters.finish_loading(adapter_version)
        self._record(adapter, resident=True)

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
        return len(adapter.pages)

    def complete(self, step: int) -> None:
        """Launched step `step` has completed: its quarantined pages are free."""
        self._allocator.complete(step)

    def counts(self) -> PageCounts:
        return self._allocator.counts()

    @property
    def evictable_pages(self) -> int:
        return sum(len(adapter.pages) for adapter in self.adapters.evictable())

    def take_changes(self) -> list[ResidencyChange]:
        """Changes of residency since the last call."""
        changes, self._changes = self._changes, []
        return changes

    def check_integrity(self) -> None:
        """Raises IntegrityError unless free + quarantined + loading + kv + prefix + adapters = all, one owner each."""
        self._allocator.check_integrity(self._owned())
        self.kv.check_integrity()

    def _owned(self) -> Iterator[tuple[PageKind, list[int]]]:
        yield PageKind.KV, list(self.kv.owned_pages())
        for adapter in self.adapters:
            yield (PageKind.LOADING if adapter.loading else PageKind.ADAPTER), adapter.pages

    def _make_room(self, num_pages: int, keep: str = "") -> bool:
        """Evicts cold adapters other than `keep` until `num_pages` are free; none when that cannot suffice."""
        short = num_pages - self._allocator.num_free
        if short <= 0:
            return True
        victims = []
        for adapter in self.adapters.evictable():
            if short <= 0:
                break
            if adapter.adapter_version != keep:
                victims.append(adapter.adapter_version)
                short -= len(adapter.pages)
        if short > 0:
            return False
        for adapter_version in victims:
            self.evict(adapter_version)
            self.evictions += 1
        return True

    def _record(self, adapter: ResidentAdapter, *, resident: bool) -> None:
        self._change_sequence += 1
        self._changes.append(
            ResidencyChange(self._change_sequence, adapter.adapter_version, resident, len(adapter.pages))
        )
