"""The packed byte string of an adapter on disk: `packed.DTYPE`, and its layout beside it."""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from adapter_store.disk import create, disk_errors, write_all
from adapter_store.weights import Array
from common.packing import ModuleSpec, PackedLayout, fill, plan
from common.wire import layout_to_proto
from loraplex.v1 import types_pb2


def packed_name(dtype: str) -> str:
    return f"packed.{dtype}"


def layout_name(dtype: str) -> str:
    return f"packed.{dtype}.layout"


def write_packed(
    directory: Path, layout: PackedLayout, weights: Iterable[tuple[ModuleSpec, Array, Array]]
) -> PackedLayout:
    """Writes string and layout, holding one module in memory at a time; returns the layout with its sha256.

    `weights` gives (spec, A, B) in the layout's order; ValueError otherwise. ResourceExhausted when the disk is full.
    """
    digest = hashlib.sha256()
    with disk_errors(), create(directory / packed_name(layout.dtype)) as file:
        for module, (spec, a, b) in zip(layout.modules, weights, strict=True):
            if (spec.layer, spec.module) != (module.layer, module.module):
                raise ValueError(f"{spec.module} of layer {spec.layer} comes where {module} belongs")
            data = fill(plan([spec], layout.dtype), {(spec.layer, spec.module): (a, b)})
            digest.update(data.data)
            write_all(file, data.data)
        os.fsync(file.fileno())
    layout = replace(layout, sha256=digest.hexdigest())
    with disk_errors(), create(directory / layout_name(layout.dtype)) as file:
        write_all(file, layout_to_proto(layout).SerializeToString())
        os.fsync(file.fileno())
    return layout


def parse_layout(data: bytes) -> types_pb2.PackedLayout:
    return types_pb2.PackedLayout.FromString(data)
