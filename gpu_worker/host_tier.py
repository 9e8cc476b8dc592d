"""Which adapters are in the host tier: verified files that the face fetched, ready to be copied into pages."""

from pathlib import Path

from common.errors import DataLoss, FailedPrecondition, LoraplexError
from common.packing import PackedLayout, check_layout
from common.wire import layout_from_proto
from gpu_worker.loader import HostAdapter
from gpu_worker.memory.geometry import PageGeometry
from loraplex.v1 import engine_pb2


class HostTier:
    """Adapters by digest: wanted (being fetched by the face) or here."""

    def __init__(self, geometry: PageGeometry, num_pages: int, module_shapes: dict[str, tuple[int, int]]) -> None:
        self._geometry = geometry
        self._num_pages = num_pages
        self._module_shapes = module_shapes
        self._adapters: dict[str, HostAdapter] = {}
        self._wanted: set[str] = set()

    def get(self, adapter_version: str) -> HostAdapter:
        """Raises KeyError when the adapter is not here."""
        return self._adapters[adapter_version]

    def layout(self, adapter_version: str) -> PackedLayout | None:
        adapter = self._adapters.get(adapter_version)
        return adapter.layout if adapter else None

    @property
    def num_bytes(self) -> int:
        return sum(adapter.layout.total_bytes for adapter in self._adapters.values())

    def want(self, adapter_version: str) -> bool:
        """True when the face must be asked for the adapter: it is neither here nor on its way."""
        if adapter_version in self._adapters or adapter_version in self._wanted:
            return False
        self._wanted.add(adapter_version)
        return True

    def add(self, fetched: engine_pb2.AdapterFetched) -> LoraplexError | None:
        """Takes a fetched adapter in; an error when it cannot be served on this base model or in this pool."""
        self._wanted.discard(fetched.adapter_version)
        try:
            layout = layout_from_proto(fetched.layout)
        except KeyError as error:
            return DataLoss("ADAPTER_CORRUPT", f"the adapter's layout has an unknown dtype or module: {error}")
        try:
            check_layout(layout, self._geometry.num_layers, self._module_shapes)
        except ValueError as error:
            return FailedPrecondition("BASE_MODEL_MISMATCH", str(error))
        num_pages = self._geometry.pages_for_bytes(layout.total_bytes)
        if num_pages >= self._num_pages:
            message = f"the adapter needs {num_pages} pages; the pool has {self._num_pages}"
            return FailedPrecondition("ADAPTER_TOO_LARGE", message)
        self._adapters[fetched.adapter_version] = HostAdapter(Path(fetched.path), layout)
        return None

    def drop(self, adapter_version: str) -> None:
        """The adapter is not here, or not to be trusted: the next request asks the face again."""
        self._wanted.discard(adapter_version)
        self._adapters.pop(adapter_version, None)
