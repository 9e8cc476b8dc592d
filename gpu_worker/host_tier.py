"""Which adapters are in the host tier: fetched files, opened, ready to be copied into pages; within a byte budget."""

from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path

from common.errors import DataLoss, FailedPrecondition, LoraplexError
from common.packing import PackedLayout, check_layout
from common.wire import layout_from_proto
from gpu_worker.byte_budget import ByteBudget
from gpu_worker.host_storage import HostBlob, HostStorage, WrongBytesError
from gpu_worker.memory.geometry import PageGeometry
from loraplex.v1 import engine_pb2

# To bring an adapter back from the worker's own disk: a question to the face, then reading at 1 GB/s.
_ASK_SECONDS = 0.005
_SECONDS_PER_BYTE = 1e-9


@dataclass(frozen=True, slots=True)
class HostAdapter:
    """An adapter in the host tier."""

    blob: HostBlob
    layout: PackedLayout


@dataclass(frozen=True, slots=True)
class HostChange:
    """An adapter came into the host tier or left it."""

    adapter_version: str
    here: bool
    num_bytes: int


class HostTier:
    """Adapters by digest: wanted (being fetched by the face) or here."""

    def __init__(
        self,
        geometry: PageGeometry,
        num_pages: int,
        module_shapes: dict[str, tuple[int, int]],
        storage: HostStorage,
        limit_bytes: int,
    ) -> None:
        self._geometry = geometry
        self._num_pages = num_pages
        self._module_shapes = module_shapes
        self._storage = storage
        self._adapters: dict[str, HostAdapter] = {}
        self._budget: ByteBudget[str] = ByteBudget(limit_bytes)
        self._wanted: set[str] = set()
        # Copies under way.
        self.num_loading = 0
        self._kept: frozenset[str] = frozenset()
        self._changes: list[HostChange] = []

    def __iter__(self) -> Iterator[tuple[str, PackedLayout]]:
        return ((version, adapter.layout) for version, adapter in self._adapters.items())

    def __len__(self) -> int:
        return len(self._adapters)

    def __contains__(self, adapter_version: str) -> bool:
        return adapter_version in self._adapters

    @property
    def num_bytes(self) -> int:
        return self._budget.used_bytes

    @property
    def limit_bytes(self) -> int:
        return self._budget.limit_bytes

    @property
    def num_wanted(self) -> int:
        return len(self._wanted)

    def layout(self, adapter_version: str) -> PackedLayout | None:
        adapter = self._adapters.get(adapter_version)
        return adapter.layout if adapter else None

    def take(self, adapter_version: str) -> HostBlob:
        """The bytes for a copy; they stay until `give_back`. Raises KeyError when the adapter is not here."""
        blob = self._adapters[adapter_version].blob
        self._budget.hold(adapter_version)
        self._budget.use(adapter_version)
        self.num_loading += 1
        return blob

    def give_back(self, adapter_version: str) -> None:
        """The copy has ended."""
        self.num_loading -= 1
        self._budget.release(adapter_version)

    def keep(self, adapter_versions: Set[str]) -> None:
        """Only the others yield until the next call: these are about to be copied into pages."""
        here = frozenset(version for version in adapter_versions if version in self._adapters)
        for version in here - self._kept:
            self._budget.hold(version)
        for version in self._kept - here:
            if version in self._adapters:
                self._budget.release(version)
        self._kept = here

    def is_wanted(self, adapter_version: str) -> bool:
        return adapter_version in self._wanted

    def want(self, adapter_version: str) -> bool:
        """True when the face must be asked for the adapter: it is neither here nor on its way."""
        if adapter_version in self._adapters or adapter_version in self._wanted:
            return False
        self._wanted.add(adapter_version)
        return True

    def add(self, fetched: engine_pb2.AdapterFetched) -> LoraplexError | None:
        """Takes a fetched adapter in; an error when it cannot be served on this base model or in this pool.

        Adapters of less value make room. When those about to be copied need it all the adapter stays outside, and
        whoever still wants it asks again.
        """
        version = fetched.adapter_version
        self._wanted.discard(version)
        if version in self._adapters:
            return None
        try:
            layout = layout_from_proto(fetched.layout)
        except KeyError as error:
            return DataLoss("ADAPTER_CORRUPT", f"the adapter's layout has an unknown dtype or module: {error}")
        if refusal := self._refusal(layout):
            return refusal
        num_bytes = self._storage.bytes_for(layout)
        victims = self._budget.make_room(num_bytes)
        if victims is None:
            return None
        for victim in victims:
            self._forget(victim)
        try:
            blob = self._storage.open(Path(fetched.path), layout)
        except WrongBytesError as problem:
            return DataLoss("ADAPTER_CORRUPT", f"the adapter cannot be loaded: {problem}")
        self._adapters[version] = HostAdapter(blob, layout)
        self._budget.add(version, num_bytes, _ASK_SECONDS + num_bytes * _SECONDS_PER_BYTE)
        self._changes.append(HostChange(version, True, layout.total_bytes))
        return None

    def drop(self, adapter_version: str) -> str:
        """The adapter is not here, or not to be trusted: the next request asks the face again. Returns its sha256."""
        self._wanted.discard(adapter_version)
        if adapter_version not in self._adapters:
            return ""
        sha256 = self._adapters[adapter_version].layout.sha256
        self._budget.remove(adapter_version)
        self._forget(adapter_version)
        return sha256

    def take_changes(self) -> list[HostChange]:
        """Changes since the last call."""
        changes, self._changes = self._changes, []
        return changes

    def _forget(self, adapter_version: str) -> None:
        adapter = self._adapters.pop(adapter_version)
        adapter.blob.close()
        self._changes.append(HostChange(adapter_version, False, adapter.layout.total_bytes))

    def _refusal(self, layout: PackedLayout) -> LoraplexError | None:
        try:
            check_layout(layout, self._geometry.num_layers, self._module_shapes)
        except ValueError as error:
            return FailedPrecondition("BASE_MODEL_MISMATCH", str(error))
        num_pages = self._geometry.pages_for_bytes(layout.total_bytes)
        if num_pages >= self._num_pages:
            message = f"the adapter needs {num_pages} pages; the pool has {self._num_pages}"
            return FailedPrecondition("ADAPTER_TOO_LARGE", message)
        if (num_bytes := self._storage.bytes_for(layout)) > self.limit_bytes:
            message = f"the adapter takes {num_bytes} bytes; the worker's host tier holds {self.limit_bytes}"
            return FailedPrecondition("ADAPTER_TOO_LARGE", message)
        return None
