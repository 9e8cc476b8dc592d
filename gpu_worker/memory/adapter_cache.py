"""Adapters in pages: loading, in use, or cold and in the eviction queue."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.packing import MODULE_INDEX, MODULES, PackedLayout
from gpu_worker.memory.allocator import PageAllocator, PageKind
from gpu_worker.memory.costs import CostModel
from gpu_worker.memory.demand import Demand, Requests, worth
from gpu_worker.memory.eviction import Candidate, EvictionQueue
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


@dataclass(slots=True, eq=False)
class ResidentAdapter(Candidate):
    """One adapter's pages. `sequence_pins` counts admitted sequences; an operator's pin adds `operator_pinned`."""

    # Never used twice: pages of another load are another adapter to whoever remembers tables.
    load_id: int
    adapter_version: str
    layout: PackedLayout
    table: ModuleTable
    pages: list[int]
    requests: Requests
    # What it takes to bring it back, as of when it was used last.
    seconds: float = 0.0
    loading: bool = True
    sequence_pins: int = 0
    operator_pinned: bool = False

    @property
    def num_pages(self) -> int:
        return len(self.pages)

    @property
    def worth(self) -> float:
        return worth(self.requests.level, self.seconds / len(self.pages))

    @property
    def cold(self) -> bool:
        """Resident and used by nobody."""
        return not (self.loading or self.sequence_pins or self.operator_pinned)


class AdapterCache:
    """Adapters by digest. No slot, no maximal rank: an adapter takes the pages its bytes take."""

    def __init__(
        self, geometry: PageGeometry, allocator: PageAllocator, queue: EvictionQueue, costs: CostModel, demand: Demand
    ) -> None:
        self._geometry = geometry
        self._allocator = allocator
        self._queue = queue
        self._costs = costs
        self._demand = demand
        self._loads = 0
        self._adapters: dict[str, ResidentAdapter] = {}
        self._operator_pinned: dict[str, ResidentAdapter] = {}

    def __len__(self) -> int:
        return len(self._adapters)

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
        requests = self._demand.of(adapter_version)
        requests.reload_seconds_per_page = 0.0
        adapter = ResidentAdapter(self._loads, adapter_version, layout, table, pages, requests)
        self._adapters[adapter_version] = adapter
        return adapter

    def finish_loading(self, adapter_version: str) -> ResidentAdapter:
        adapter = self._adapters[adapter_version]
        adapter.loading = False
        self._allocator.relabel(adapter.pages, PageKind.ADAPTER)
        self._rest(adapter)
        return adapter

    def acquire(self, adapter: ResidentAdapter) -> None:
        """One more admitted sequence uses the adapter."""
        adapter.sequence_pins += 1
        self._queue.discard(adapter)

    def release(self, adapter: ResidentAdapter) -> None:
        """An admitted sequence uses the adapter no more; it stays until its pages are needed."""
        adapter.sequence_pins -= 1
        self._rest(adapter)

    def touch(self, adapter_version: str, step: int) -> None:
        """A launched step reads the adapter."""
        self._adapters[adapter_version].last_step = step

    def set_operator_pin(self, adapter_version: str, *, pinned: bool) -> None:
        """Keeps an adapter in pages, or no longer. Raises KeyError when it is not resident, or not yet."""
        adapter = self._adapters[adapter_version]
        if adapter.loading:
            raise KeyError(adapter_version)
        self._queue.discard(adapter)
        adapter.operator_pinned = pinned
        if pinned:
            self._operator_pinned[adapter_version] = adapter
        else:
            self._operator_pinned.pop(adapter_version, None)
        self._rest(adapter)

    @property
    def num_operator_pinned(self) -> int:
        """Adapters that operators pinned."""
        return len(self._operator_pinned)

    def operator_pinned_pages(self, *, excluding: str) -> int:
        """Pages of adapters that operators pinned, other than `excluding`."""
        pinned = (adapter for adapter in self._operator_pinned.values() if adapter.adapter_version != excluding)
        return sum(adapter.num_pages for adapter in pinned)

    def remove(self, adapter_version: str) -> ResidentAdapter:
        """Frees the adapter's pages. Raises AdapterInUseError saying by whom it is held."""
        adapter = self._adapters[adapter_version]
        if adapter.sequence_pins:
            raise AdapterInUseError(f"{adapter.sequence_pins} running sequences use the adapter")
        if adapter.operator_pinned:
            raise AdapterInUseError("an operator pinned the adapter")
        del self._adapters[adapter_version]
        self._queue.discard(adapter)
        self._allocator.free(adapter.pages, adapter.last_step)
        adapter.requests.withdraw()
        adapter.requests.reload_seconds_per_page = self._load_seconds(adapter) / adapter.num_pages
        return adapter

    def _rest(self, adapter: ResidentAdapter) -> None:
        """Puts the adapter in the eviction queue when it is cold."""
        if adapter.cold:
            adapter.seconds = self._load_seconds(adapter)
            self._queue.add(adapter)

    def _load_seconds(self, adapter: ResidentAdapter) -> float:
        return self._costs.load_seconds(adapter.adapter_version, adapter.layout.total_bytes)
