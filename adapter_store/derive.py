"""Packed strings made on demand: another dtype, or the part that one tensor-parallel rank needs."""

import secrets
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from adapter_store.blobs import Blobs
from adapter_store.disk import check_room
from adapter_store.dtypes import convert
from adapter_store.packed import write_packed
from adapter_store.packed_reader import PackedReader, damaged
from adapter_store.registry import Version
from adapter_store.weights import ELEMENTS, Array
from common.errors import FailedPrecondition
from common.packing import (
    UNIT_BYTES,
    ModuleSpec,
    PackedLayout,
    PackedModule,
    plan,
    row_units,
    shard,
    shard_spec,
    unpack,
)
from common.wire import layout_from_proto


@dataclass(frozen=True, slots=True)
class Form:
    """How a worker wants an adapter: in `dtype`, whole or part `tp_rank` of `tp_size`."""

    dtype: str
    tp_rank: int = 0
    tp_size: int = 1

    @property
    def name(self) -> str:
        """Of the folder that holds it."""
        return f"{self.dtype}.{self.tp_rank}of{self.tp_size}"

    def is_own(self, version: Version) -> bool:
        """Whether it is what the object itself holds."""
        return self.dtype == version.dtype and self.tp_size == 1


def open_form(blobs: Blobs, version: Version, form: Form) -> PackedReader:
    """The packed string in this form, made first when nobody has asked for it before. Blocks.

    Raises DataLoss when the stored bytes are damaged, FailedPrecondition when there is no such form,
    ResourceExhausted when the disk is full.
    """
    if form.is_own(version):
        return PackedReader.open(blobs.object_dir(version.digest), version, form.dtype)
    target = blobs.derived_dir(version.digest) / form.name
    if not target.exists():
        _make(blobs, version, form, target)
    return PackedReader.open(target, version, form.dtype)


def _make(blobs: Blobs, version: Version, form: Form, target: Path) -> None:
    source = PackedReader.open(blobs.object_dir(version.digest), version, version.dtype)
    try:
        if not source.is_intact():
            raise damaged(version)
        layout = layout_from_proto(source.layout)
        try:
            specs = [shard_spec(_spec(module), form.tp_rank, form.tp_size) for module in layout.modules]
        except ValueError as error:
            raise FailedPrecondition("TP_SIZE_UNSUPPORTED", str(error)) from None
        new = plan(specs, form.dtype)
        check_room(blobs.staging, new.total_bytes, blobs.reserve_bytes)
        making = blobs.staging / f"derived-{secrets.token_hex(16)}"
        making.mkdir(mode=0o700)
        try:
            write_packed(making, new, _modules(source, layout, form))
            blobs.put_derived(making, target)
        finally:
            blobs.remove(making)
    finally:
        source.close()


def _modules(source: PackedReader, layout: PackedLayout, form: Form) -> Iterator[tuple[ModuleSpec, Array, Array]]:
    """Module by module, so that one at a time is in memory."""
    for module in layout.modules:
        start = module.start_unit * UNIT_BYTES
        data = np.frombuffer(source.read(start, _module_bytes(module, layout.dtype)), dtype=np.uint8)
        alone = replace(layout, total_bytes=data.size, modules=(replace(module, start_unit=0),))
        a, b = unpack(alone, data, ELEMENTS[layout.dtype])[module.layer, module.module]
        a, b = shard(_spec(module), a, b, form.tp_rank, form.tp_size)
        try:
            converted = convert(a, layout.dtype, form.dtype), convert(b, layout.dtype, form.dtype)
        except ValueError as error:
            message = f"{module.module} of layer {module.layer}: {error}"
            raise FailedPrecondition("DTYPE_OVERFLOW", message) from None
        yield shard_spec(_spec(module), form.tp_rank, form.tp_size), *converted


def _spec(module: PackedModule) -> ModuleSpec:
    return ModuleSpec(
        module.layer, module.module, module.lora_rank, module.scaling, module.in_features, module.out_features
    )


def _module_bytes(module: PackedModule, dtype: str) -> int:
    rows = row_units(module.in_features, dtype) + row_units(module.out_features, dtype)
    return module.lora_rank * rows * UNIT_BYTES
