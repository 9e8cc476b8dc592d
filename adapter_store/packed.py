"""The packed byte string of an adapter on disk: `packed.DTYPE`, and its layout beside it."""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

from blake3 import blake3

from adapter_store.disk import create, disk_errors, write_all
from adapter_store.lane import Lane
from adapter_store.weights import Array
from common.packing import ModuleSpec, PackedLayout, fill, plan
from common.wire import layout_to_proto
from loraplex.v1 import types_pb2


def packed_name(dtype: str) -> str:
    return f"packed.{dtype}"


def layout_name(dtype: str) -> str:
    return f"packed.{dtype}.layout"


class _Digests:
    """What the layout will promise of the bytes."""

    def __init__(self) -> None:
        self._sha256, self._blake3 = hashlib.sha256(), blake3()

    def update(self, data: memoryview) -> None:
        self._sha256.update(data)
        self._blake3.update(data)

    def put_into(self, layout: PackedLayout) -> PackedLayout:
        return replace(layout, sha256=self._sha256.hexdigest(), blake3=self._blake3.hexdigest())


def write_packed(
    directory: Path, layout: PackedLayout, weights: Iterable[tuple[ModuleSpec, Array, Array]]
) -> PackedLayout:
    """Writes string and layout, holding a few modules in memory at a time; returns the layout with its digests.

    `weights` gives (spec, A, B) in the layout's order; ValueError otherwise. ResourceExhausted when the disk is full.
    """
    digests = _Digests()
    with disk_errors(), create(directory / packed_name(layout.dtype)) as file, Lane() as hashing:
        for module, (spec, a, b) in zip(layout.modules, weights, strict=True):
            if (spec.layer, spec.module) != (module.layer, module.module):
                raise ValueError(f"{spec.module} of layer {spec.layer} comes where {module} belongs")
            data = fill(plan([spec], layout.dtype), {(spec.layer, spec.module): (a, b)})
            hashing.give(partial(digests.update, data.data))
            write_all(file, data.data)
        os.fsync(file.fileno())
        hashing.finish()
    layout = digests.put_into(layout)
    with disk_errors(), create(directory / layout_name(layout.dtype)) as file:
        write_all(file, layout_to_proto(layout).SerializeToString())
        os.fsync(file.fileno())
    return layout


def parse_layout(data: bytes) -> types_pb2.PackedLayout:
    return types_pb2.PackedLayout.FromString(data)
