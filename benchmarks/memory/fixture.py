"""Model S with random weights, and random adapters for it as files: ranks 8, 16, 32, 64 in turn on q, k, v, o."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.kernels.models import RANKS, SIZES
from common.base_model import geometry, read_config
from common.packing import MODULES, ModuleSpec, PackedLayout, pack, plan
from common.wire import layout_to_proto
from gpu_worker.memory.geometry import PageGeometry
from loraplex.v1 import engine_pb2

SIZE = SIZES["S"]
PAGE_SIZE = 16
PAGES = PageGeometry(SIZE.layers, SIZE.kv_heads, SIZE.head_dim, 4, PAGE_SIZE)


@dataclass(frozen=True, slots=True)
class Adapter:
    """A packed string in a file."""

    version: str
    path: Path
    layout: PackedLayout

    @property
    def num_pages(self) -> int:
        return PAGES.pages_for_bytes(self.layout.total_bytes)

    def fetched(self) -> engine_pb2.AdapterFetched:
        return engine_pb2.AdapterFetched(
            tenant="default", adapter_version=self.version, path=str(self.path), layout=layout_to_proto(self.layout)
        )


@contextmanager
def checkpoint_and_adapters(num_adapters: int) -> Iterator[tuple[Path, list[Adapter]]]:
    """Files of a temporary folder."""
    from benchmarks.serving.models import save_base

    with TemporaryDirectory(prefix="bench-memory-") as name:
        base = Path(name) / "base"
        save_base(base, SIZE)
        shapes = geometry(read_config(base)).module_shapes
        yield base, [_write(Path(name), index, shapes) for index in range(num_adapters)]


def _write(folder: Path, index: int, shapes: dict[str, tuple[int, int]]) -> Adapter:
    rng, rank = np.random.default_rng(index), RANKS[index % len(RANKS)]
    specs, weights = [], {}
    for layer in range(SIZE.layers):
        for module in MODULES[:4]:
            in_features, out_features = shapes[module]
            specs.append(ModuleSpec(layer, module, rank, 1.0, in_features, out_features))
            a = rng.standard_normal((rank, in_features), np.float32) * np.float32(in_features**-0.5)
            b = rng.standard_normal((out_features, rank), np.float32) * np.float32(0.05)
            weights[layer, module] = (a, b)
    layout, data = pack(plan(specs, "float32"), weights)
    path = folder / f"{index}.packed"
    path.write_bytes(data.tobytes())
    return Adapter(f"{index:064x}", path, layout)
