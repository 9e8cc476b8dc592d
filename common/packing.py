"""The packed adapter: one byte string that the store writes once and a worker copies page by page.

    layer 0                                                        layer 1
    q_proj                          k_proj
    A row 0 | A row 1 | .. | B^T row 0 | B^T row 1 | .. | A row 0 | ..
    ^ each row starts on a 128-byte unit, in the adapter's own dtype

A row has `in_features` elements, a transposed B row has `out_features`; a module of rank r has r rows of each. Nothing
depends on a page size: a byte at offset `o` is in page `o // page_bytes`, and because a page is a whole number of
units, a kernel looks a page up once per unit. Scaling is kept beside the bytes, never multiplied into them.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

UNIT_BYTES = 128
# Rows are written in blocks of so many columns: of a transposed matrix these are still in cache when the next row is.
_BLOCK_COLUMNS = 256

# Canonical order; the index is the module's number in tables on the device.
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MODULE_INDEX = {name: index for index, name in enumerate(MODULES)}

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class PackedModule:
    """Where one module of one layer is. `start_unit` counts units of 128 bytes from the start of the string."""

    layer: int
    module: str
    start_unit: int
    lora_rank: int
    scaling: float
    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Layout of a packed adapter; `modules` is sorted by (layer, canonical module order), absent ones left out."""

    dtype: str
    total_bytes: int
    modules: tuple[PackedModule, ...]
    sha256: str = ""
    blake3: str = ""


@dataclass(frozen=True, slots=True)
class ModuleSpec:
    """One module before it has a place."""

    layer: int
    module: str
    lora_rank: int
    scaling: float
    in_features: int
    out_features: int


# Split by output features among tensor-parallel ranks, A replicated; the others are split by input features, B
# replicated: the partial sums of LoRA ride in the base's own reduction.
COLUMN_PARALLEL = frozenset({"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"})


def shard_spec(spec: ModuleSpec, tp_rank: int, tp_size: int) -> ModuleSpec:
    """The part of a module that rank `tp_rank` of `tp_size` has. Raises ValueError when it does not divide."""
    if not 0 <= tp_rank < tp_size:
        raise ValueError(f"tp_rank is {tp_rank}; it must be below tp_size, which is {tp_size}")
    name = "out_features" if spec.module in COLUMN_PARALLEL else "in_features"
    features = spec.out_features if spec.module in COLUMN_PARALLEL else spec.in_features
    if features % tp_size:
        raise ValueError(f"{name} of {spec.module} is {features}, which {tp_size} ranks do not divide evenly")
    if spec.module in COLUMN_PARALLEL:
        return replace(spec, out_features=features // tp_size)
    return replace(spec, in_features=features // tp_size)


def shard(
    spec: ModuleSpec, a: npt.NDArray[np.generic], b: npt.NDArray[np.generic], tp_rank: int, tp_size: int
) -> tuple[npt.NDArray[np.generic], npt.NDArray[np.generic]]:
    """A `[lora_rank, in_features]` and B `[out_features, lora_rank]` of the whole module -> those of one rank."""
    part = shard_spec(spec, tp_rank, tp_size)
    if spec.module in COLUMN_PARALLEL:
        return a, b[tp_rank * part.out_features : (tp_rank + 1) * part.out_features]
    return a[:, tp_rank * part.in_features : (tp_rank + 1) * part.in_features], b


def row_units(features: int, dtype: str) -> int:
    """Units of 128 bytes that one row of `features` elements takes."""
    return -(-features * ELEMENT_BYTES[dtype] // UNIT_BYTES)


def plan(specs: Iterable[ModuleSpec], dtype: str) -> PackedLayout:
    """Places the modules in canonical order."""
    unit, modules = 0, []
    for spec in sorted(specs, key=lambda spec: (spec.layer, MODULE_INDEX[spec.module])):
        rows = row_units(spec.in_features, dtype) + row_units(spec.out_features, dtype)
        modules.append(
            PackedModule(
                spec.layer, spec.module, unit, spec.lora_rank, spec.scaling, spec.in_features, spec.out_features
            )
        )
        unit += spec.lora_rank * rows
    return PackedLayout(dtype, unit * UNIT_BYTES, tuple(modules))


def pack(
    layout: PackedLayout, weights: Mapping[tuple[int, str], tuple[npt.NDArray[np.generic], npt.NDArray[np.generic]]]
) -> tuple[PackedLayout, npt.NDArray[np.uint8]]:
    """Writes the byte string and returns it with the layout that carries its sha256 and its BLAKE3.

    `weights[layer, module]` = (A `[lora_rank, in_features]`, B `[out_features, lora_rank]`), any element type of the
    layout's width (bits are moved, never converted). Raises ValueError on a shape or a width that differs from it.
    """
    # only who packs needs it: kernels are run and measured where it is not installed
    from blake3 import blake3

    data = fill(layout, weights)
    sha256, blake = hashlib.sha256(data.data).hexdigest(), blake3(data.data).hexdigest()
    return replace(layout, sha256=sha256, blake3=blake), data


def fill(
    layout: PackedLayout, weights: Mapping[tuple[int, str], tuple[npt.NDArray[np.generic], npt.NDArray[np.generic]]]
) -> npt.NDArray[np.uint8]:
    """The byte string alone, as `pack` writes it."""
    data = np.zeros(layout.total_bytes, dtype=np.uint8)
    for module in layout.modules:
        a, b = weights[module.layer, module.module]
        expected_a, expected_b = (module.lora_rank, module.in_features), (module.out_features, module.lora_rank)
        if a.shape != expected_a or b.shape != expected_b:
            name = f"layer {module.layer} {module.module}"
            raise ValueError(f"{name}: A {a.shape} and B {b.shape} where {expected_a} and {expected_b} belong")
        if {a.itemsize, b.itemsize} != {ELEMENT_BYTES[layout.dtype]}:
            raise ValueError(f"layer {module.layer} {module.module}: {a.dtype} and {b.dtype} are not {layout.dtype}")
        start = module.start_unit * UNIT_BYTES
        start = _write_rows(data, start, a, row_units(module.in_features, layout.dtype))
        _write_rows(data, start, b.T, row_units(module.out_features, layout.dtype))
    return data


def _write_rows(data: npt.NDArray[np.uint8], start: int, rows: npt.NDArray[np.generic], units: int) -> int:
    """Writes `rows` `[num_rows, features]`, each padded to `units` units; returns the offset after them."""
    end: int = start + rows.shape[0] * units * UNIT_BYTES
    padded = data[start:end].view(rows.dtype).reshape(rows.shape[0], -1)
    for first in range(0, rows.shape[1], _BLOCK_COLUMNS):
        last = min(first + _BLOCK_COLUMNS, rows.shape[1])
        padded[:, first:last] = rows[:, first:last]
    return end


def unpack(
    layout: PackedLayout, data: npt.NDArray[np.uint8], element: npt.DTypeLike
) -> dict[tuple[int, str], tuple[npt.NDArray[np.generic], npt.NDArray[np.generic]]]:
    """The inverse of `pack`; `element` is a numpy type of the layout's width (bfloat16 has none: use uint16)."""
    weights = {}
    for module in layout.modules:
        start = module.start_unit * UNIT_BYTES
        a, start = _read_rows(data, start, module.lora_rank, module.in_features, layout.dtype, element)
        b, _ = _read_rows(data, start, module.lora_rank, module.out_features, layout.dtype, element)
        weights[module.layer, module.module] = (a, b.T)
    return weights


def _read_rows(
    data: npt.NDArray[np.uint8], start: int, num_rows: int, features: int, dtype: str, element: npt.DTypeLike
) -> tuple[npt.NDArray[np.generic], int]:
    row_bytes = row_units(features, dtype) * UNIT_BYTES
    end = start + num_rows * row_bytes
    rows = data[start:end].reshape(num_rows, row_bytes)[:, : features * ELEMENT_BYTES[dtype]]
    return np.ascontiguousarray(rows).view(element).reshape(num_rows, features), end


def check_layout(layout: PackedLayout, num_layers: int, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raises ValueError when a module does not fit a base of `num_layers` and `shapes[module] = (in, out)`."""
    for module in layout.modules:
        if module.layer >= num_layers:
            raise ValueError(f"the adapter changes layer {module.layer}; the base model has {num_layers} layers")
        rows = row_units(module.in_features, layout.dtype) + row_units(module.out_features, layout.dtype)
        end = (module.start_unit + module.lora_rank * rows) * UNIT_BYTES
        if module.start_unit < 0 or module.lora_rank < 1 or end > layout.total_bytes:
            raise ValueError(
                f"layer {module.layer} {module.module} ends at byte {end} of a string of {layout.total_bytes} bytes"
            )
        expected = shapes.get(module.module)
        if (module.in_features, module.out_features) != expected:
            raise ValueError(
                f"the adapter's {module.module} is {module.in_features} to {module.out_features}; "
                f"the base model's is {_arrow(expected)}"
            )


def _arrow(shape: Sequence[int] | None) -> str:
    return "absent" if shape is None else f"{shape[0]} to {shape[1]}"
