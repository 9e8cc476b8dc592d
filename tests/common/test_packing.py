"""The packed adapter: nothing lost, everything on its unit, wrong shapes refused."""

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from common.packing import (
    ELEMENT_BYTES,
    MODULES,
    UNIT_BYTES,
    ModuleSpec,
    PackedLayout,
    check_layout,
    pack,
    plan,
    row_units,
    unpack,
)

Weights = dict[tuple[int, str], tuple[npt.NDArray[np.generic], npt.NDArray[np.generic]]]

ELEMENTS: dict[str, type[np.unsignedinteger[Any]]] = {"float32": np.uint32, "bfloat16": np.uint16, "float16": np.uint16}

# Sizes around the 128-byte unit (32 or 64 elements), and ones that divide nothing.
features = st.sampled_from([1, 31, 32, 33, 63, 64, 65, 100, 111, 129])
specs = st.builds(
    ModuleSpec,
    layer=st.integers(0, 3),
    module=st.sampled_from(MODULES),
    lora_rank=st.sampled_from([1, 2, 3, 7, 8, 24]),
    scaling=st.floats(0.01, 4.0),
    in_features=features,
    out_features=features,
)
spec_lists = st.lists(specs, max_size=8, unique_by=lambda spec: (spec.layer, spec.module))
dtypes = st.sampled_from(sorted(ELEMENT_BYTES))


def draw_weights(layout: PackedLayout, seed: int = 0) -> Weights:
    """Random bits, never all zero, so that padding can be told from content."""
    generator, element = np.random.default_rng(seed), ELEMENTS[layout.dtype]

    def bits(*shape: int) -> npt.NDArray[np.generic]:
        return generator.integers(1, np.iinfo(element).max, shape, dtype=element)

    return {
        (module.layer, module.module): (
            bits(module.lora_rank, module.in_features),
            bits(module.out_features, module.lora_rank),
        )
        for module in layout.modules
    }


def one_module(dtype: str = "float32", lora_rank: int = 3) -> PackedLayout:
    return plan([ModuleSpec(0, "q_proj", lora_rank, 1.0, 33, 65)], dtype)


@given(spec_lists, dtypes, st.integers(0, 2**32))
def test_unpack_returns_what_was_packed(modules: list[ModuleSpec], dtype: str, seed: int) -> None:
    layout = plan(modules, dtype)
    weights = draw_weights(layout, seed)
    packed, data = pack(layout, weights)
    restored = unpack(packed, data, ELEMENTS[dtype])
    assert restored.keys() == weights.keys()
    for key, (a, b) in weights.items():
        np.testing.assert_array_equal(restored[key][0], a)
        np.testing.assert_array_equal(restored[key][1], b)


@given(spec_lists, dtypes)
def test_modules_are_in_canonical_order_without_gaps(modules: list[ModuleSpec], dtype: str) -> None:
    layout, unit = plan(modules, dtype), 0
    for module in layout.modules:
        assert module.start_unit == unit
        unit += module.lora_rank * (row_units(module.in_features, dtype) + row_units(module.out_features, dtype))
    assert layout.total_bytes == unit * UNIT_BYTES
    keys = [(module.layer, MODULES.index(module.module)) for module in layout.modules]
    assert keys == sorted((spec.layer, MODULES.index(spec.module)) for spec in modules)


@given(spec_lists, dtypes)
def test_the_order_of_the_specs_does_not_matter(modules: list[ModuleSpec], dtype: str) -> None:
    assert plan(modules, dtype) == plan(reversed(modules), dtype)


@pytest.mark.parametrize(
    ("row_features", "dtype", "units"),
    [(1, "float32", 1), (32, "float32", 1), (33, "float32", 2), (64, "bfloat16", 1), (65, "float16", 2)],
)
def test_a_row_takes_whole_units(row_features: int, dtype: str, units: int) -> None:
    assert row_units(row_features, dtype) == units


def test_each_row_starts_on_a_unit_and_its_padding_is_zero() -> None:
    layout = one_module()
    weights = draw_weights(layout)
    _, data = pack(layout, weights)
    a, b = weights[0, "q_proj"]
    rows = [*a, *b.T]
    offset = 0
    for row in rows:
        row_bytes = row_units(row.size, "float32") * UNIT_BYTES
        assert data[offset : offset + row_bytes].tobytes() == row.tobytes().ljust(row_bytes, b"\0")
        offset += row_bytes
    assert offset == data.size


def test_a_negative_zero_and_a_nan_keep_their_bits() -> None:
    layout = plan([ModuleSpec(0, "q_proj", 1, 1.0, 2, 1)], "float32")
    a = np.array([[0x80000000, 0x7FC01234]], dtype=np.uint32).view(np.float32)
    packed, data = pack(layout, {(0, "q_proj"): (a, np.ones((1, 1), np.float32))})
    assert unpack(packed, data, np.float32)[0, "q_proj"][0].tobytes() == a.tobytes()


def test_the_layout_carries_the_checksum_of_the_bytes() -> None:
    layout = one_module()
    packed, data = pack(layout, draw_weights(layout))
    assert packed.sha256 == hashlib.sha256(data.tobytes()).hexdigest()
    assert packed.blake3 == blake3(data.tobytes()).hexdigest()


def test_a_strided_matrix_is_packed_by_its_values() -> None:
    layout = one_module()
    a, b = draw_weights(layout)[0, "q_proj"]
    _, expected = pack(layout, {(0, "q_proj"): (a, b)})
    _, data = pack(layout, {(0, "q_proj"): (np.asfortranarray(a), np.asfortranarray(b))})
    np.testing.assert_array_equal(data, expected)


@pytest.mark.parametrize(
    ("a_shape", "b_shape"), [((3, 32), (65, 3)), ((3, 33), (3, 65)), ((4, 33), (65, 3)), ((3, 33), (65, 4))]
)
def test_a_wrong_shape_is_refused_with_the_module_named(a_shape: tuple[int, int], b_shape: tuple[int, int]) -> None:
    weights = {(0, "q_proj"): (np.ones(a_shape, np.float32), np.ones(b_shape, np.float32))}
    with pytest.raises(ValueError, match="layer 0 q_proj"):
        pack(one_module(), weights)


@pytest.mark.parametrize("element", [np.float64, np.float16])
def test_elements_of_another_width_are_refused(element: npt.DTypeLike) -> None:
    weights = {(0, "q_proj"): (np.ones((3, 33), element), np.ones((65, 3), element))}
    with pytest.raises(ValueError, match="are not float32"):
        pack(one_module(), weights)


def test_a_layout_that_fits_the_base_passes() -> None:
    check_layout(one_module(), 1, {"q_proj": (33, 65)})


@pytest.mark.parametrize(
    ("num_layers", "shapes", "sentence"),
    [
        (0, {"q_proj": (33, 65)}, "changes layer 0; the base model has 0 layers"),
        (1, {"q_proj": (33, 64)}, "q_proj is 33 to 65; the base model's is 33 to 64"),
        (1, {}, "the base model's is absent"),
    ],
    ids=["layer", "shape", "module"],
)
def test_a_layout_that_does_not_fit_is_refused(
    num_layers: int, shapes: dict[str, tuple[int, int]], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        check_layout(one_module(), num_layers, shapes)


def test_a_layout_that_leaves_its_string_is_refused() -> None:
    layout = plan([ModuleSpec(0, "q_proj", 4, 1.0, 64, 64)], "float32")
    check_layout(layout, 1, {"q_proj": (64, 64)})
    with pytest.raises(ValueError, match=r"layer 0 q_proj ends at byte 2048 of a string of 2047 bytes"):
        check_layout(replace(layout, total_bytes=layout.total_bytes - 1), 1, {"q_proj": (64, 64)})
