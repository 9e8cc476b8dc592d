"""Between plain values and the messages that carry them."""

from common.packing import MODULES, PackedLayout, PackedModule
from loraplex.v1 import types_pb2

_DTYPES = {
    "float32": types_pb2.DTYPE_FLOAT32,
    "bfloat16": types_pb2.DTYPE_BFLOAT16,
    "float16": types_pb2.DTYPE_FLOAT16,
}
_DTYPE_NAMES = {number: name for name, number in _DTYPES.items()}
_MODULES = dict(
    zip(
        MODULES,
        (
            types_pb2.LORA_MODULE_Q_PROJ,
            types_pb2.LORA_MODULE_K_PROJ,
            types_pb2.LORA_MODULE_V_PROJ,
            types_pb2.LORA_MODULE_O_PROJ,
            types_pb2.LORA_MODULE_GATE_PROJ,
            types_pb2.LORA_MODULE_UP_PROJ,
            types_pb2.LORA_MODULE_DOWN_PROJ,
        ),
        strict=True,
    )
)
_MODULE_NAMES = {number: name for name, number in _MODULES.items()}


def dtype_to_proto(dtype: str) -> "types_pb2.Dtype.ValueType":
    """Raises KeyError for a dtype the wire has no number for."""
    return _DTYPES[dtype]


def dtype_from_proto(dtype: "types_pb2.Dtype.ValueType") -> str:
    return _DTYPE_NAMES[dtype]


def module_to_proto(module: str) -> "types_pb2.LoraModule.ValueType":
    return _MODULES[module]


def layout_to_proto(layout: PackedLayout) -> types_pb2.PackedLayout:
    modules = [
        types_pb2.PackedModule(
            layer=module.layer,
            module=_MODULES[module.module],
            start_unit=module.start_unit,
            lora_rank=module.lora_rank,
            scaling=module.scaling,
            in_features=module.in_features,
            out_features=module.out_features,
        )
        for module in layout.modules
    ]
    return types_pb2.PackedLayout(
        dtype=_DTYPES[layout.dtype],
        total_bytes=layout.total_bytes,
        sha256=layout.sha256,
        blake3=layout.blake3,
        modules=modules,
    )


def layout_from_proto(proto: types_pb2.PackedLayout) -> PackedLayout:
    modules = tuple(
        PackedModule(
            layer=module.layer,
            module=_MODULE_NAMES[module.module],
            start_unit=module.start_unit,
            lora_rank=module.lora_rank,
            scaling=module.scaling,
            in_features=module.in_features,
            out_features=module.out_features,
        )
        for module in proto.modules
    )
    return PackedLayout(_DTYPE_NAMES[proto.dtype], proto.total_bytes, modules, proto.sha256, proto.blake3)
