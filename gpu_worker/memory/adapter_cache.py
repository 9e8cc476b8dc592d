"""Adapters in pages: loading, in use, or cold and evictable in least recently used order."""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.packing import MODULE_INDEX, MODULES, PackedLayout
from gpu_worker.memory.allocator import PageAllocator, PageKind
from gpu_worker.memory.geometry import PageGeometry


class AdapterInUseError(Exception):
    """The adapter cannot be evicted: sequences use it, an operator pinned it, or it is loading."""


@dataclass(frozen=True, slots=True)
class ModuleTable:
    """Where a kernel finds each module in the adapter's byte string."""

    # [num_layers, num_modules] int32, units of 128 bytes
    start_unit: npt.NDArray[np.int32]
    # [num_layers, num_modules] int32, 0 = absent
    lora_rank: npt.NDArray[np.int32]
    # [num_layers, num_modules] float32
    scaling: npt.NDArray[np.float32]

    @classmethod
    def of(cls, layout: PackedLayout, num_layers: int) -> "ModuleTable":
        shape = (num_layers, len(MODULES))
        table = cls(np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.float32))
        for module in layout.modules:
            cell = module.layer, MODULE_INDEX[module.module]
            table.start_unit[cell] = module.start_unit
            table.lora_rank[cell] = module.lora_rank
            table.scaling[cell] = module.scaling
        return table


@dataclass(slots=True)
class ResidentAdapter:
    """One adapter's pages. `sequence_pins` counts admitted sequences; an operator's pin adds `operator_pinned`."""

    # Never used twice: pages of another load are another adapter to whoever remembers tables.
    load_id: int
    adapter_version: str
    layout: PackedLayout
    table: ModuleTable
    pages: list[int]
    loading: bool = True
    sequence_pins: int = 0
    operator_pinned: bool = False
    # The last launched step that may read the pages.
    last_step: int = 0

    @property
    def evictable(self) -> bool:
        return not (self.loading or self.sequence_pins or self.operator_pinned)


class AdapterCache:
    """Adapters by digest. No slot, no maximal rank: an adapter takes the pages its bytes take."""

    def __init__(self, geometry: PageGeometry, allocator: PageAllocator) -> None:
        self._geometry = geometry
        self._allocator = allocator
        self._loads = 0
        # least recently used first
        self._adapters: OrderedDict[str, ResidentAdapter] = OrderedDict()

    def __iter__(self) -> Iterator[ResidentAdapter]:
        return iter(self._adapters.values())

    def get(self, adapter_version: str) -> ResidentAdapter | None:
        return self._adapters.get(adapter_version)

    def add_loading(self, adapter_version: str, layout: PackedLayout) -> ResidentAdapter:
        """Takes pages for the byte string. Raises OutOfPagesError, having taken none, when pages are short."""
        num_pages = self._geometry.pages_for_bytes(layout.total_bytes)
        pages = self._allocator.allocate(num_pages, PageKind.LOADING)
        table = ModuleTable.of(layout, self._geometry.num_layers)
        self._loads += 1
        adapter = ResidentAdapter(self._loads, adapter_version, layout, table, pages)
        self._adapters[adapter_version] = adapter
        return adapter

    def finish_loading(self, adapter_version: str) -> ResidentAdapter:
        adapter = self._adapters[adapter_version]
        adapter.loading = False
        self._allocator.relabel(adapter.pages, PageKind.ADAPTER)
        return adapter

    def touch(self, adapter_version: str, step: int) -> None:
        """A launched step reads the adapter."""
        self._adapters[adapter_version].last_step = step
        self._adapters.move_to_end(adapter_version)

    def set_operator_pin(self, adapter_version: str, *, pinned: bool) -> None:
        """Keeps an adapter in pages, or no longer. Raises KeyError when it is not resident, or not yet."""
        if self._adapters[adapter_version].loading:
            raise KeyError(adapter_version)
        self._adapters[adapter_version].operator_pinned = pinned

    def evictable(self) -> Iterator[ResidentAdapter]:
        """Cold adapters whose last step has completed, least recently used first."""
        completed = self._allocator.completed_step
        return (adapter for adapter in self._adapters.values() if adapter.evictable and adapter.last_step <= completed)

    def remove(self, adapter_version: str) -> ResidentAdapter:
        """Frees the adapter's pages. Raises AdapterInUseError saying by whom it is held."""
        adapter = self._adapters[adapter_version]
        if adapter.sequence_pins:
            raise AdapterInUseError(f"{adapter.sequence_pins} running sequences use the adapter")
        if adapter.operator_pinned:
            raise AdapterInUseError("an operator pinned the adapter")
        del self._adapters[adapter_version]
        self._allocator.free(adapter.pages, adapter.last_step)
        return adapter
