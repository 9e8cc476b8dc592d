"""Plain values survive their way through the messages."""

import pytest

from common import wire
from common.packing import ELEMENT_BYTES, MODULES, ModuleSpec, pack, plan
from loraplex.v1 import types_pb2
from tests.common.test_packing import draw_weights


def test_a_layout_survives_the_round_trip() -> None:
    # A scaling that a float32 field holds exactly.
    modules = [ModuleSpec(layer, name, 3, 0.75, 33, 65) for layer in range(2) for name in MODULES]
    layout = plan(modules, "bfloat16")
    packed, _ = pack(layout, draw_weights(layout))
    proto = types_pb2.PackedLayout.FromString(wire.layout_to_proto(packed).SerializeToString())
    assert wire.layout_from_proto(proto) == packed


@pytest.mark.parametrize("dtype", sorted(ELEMENT_BYTES))
def test_a_dtype_survives_the_round_trip(dtype: str) -> None:
    assert wire.dtype_from_proto(wire.dtype_to_proto(dtype)) == dtype


def test_every_dtype_of_the_wire_has_a_name() -> None:
    numbers = set(types_pb2.Dtype.values()) - {types_pb2.DTYPE_UNSPECIFIED}
    assert {wire.dtype_from_proto(number) for number in numbers} == set(ELEMENT_BYTES)


def test_every_module_has_its_own_number() -> None:
    numbers = set(types_pb2.LoraModule.values()) - {types_pb2.LORA_MODULE_UNSPECIFIED}
    assert {wire.module_to_proto(module) for module in MODULES} == numbers


def test_an_unspecified_dtype_is_refused() -> None:
    with pytest.raises(KeyError):
        wire.dtype_from_proto(types_pb2.DTYPE_UNSPECIFIED)
