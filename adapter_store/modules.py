"""From the names of tensors to modules: which layer, which projection, A or B."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NoReturn

from adapter_store.peft_config import AdapterConfig
from adapter_store.weights import TensorInfo
from common.errors import InvalidArgument
from common.packing import MODULE_INDEX, ModuleSpec

_NAME = re.compile(
    r"base_model\.model\.(?P<key>(?:model\.)?layers\.(?P<layer>0|[1-9][0-9]{0,3})\."
    r"(?:self_attn\.(?P<attention>[qkvo]_proj)|mlp\.(?P<mlp>(?:gate|up|down)_proj)))"
    r"\.lora_(?P<part>[AB])(?:\.default)?\.weight"
)


@dataclass(frozen=True, slots=True)
class LoraTensors:
    """The two tensors of one module of one layer: A `[lora_rank, in_features]`, B `[out_features, lora_rank]`."""

    spec: ModuleSpec
    a: TensorInfo
    b: TensorInfo


def _refuse(reason: str, message: str) -> NoReturn:
    raise InvalidArgument(reason, message)


def pair_tensors(tensors: Iterable[TensorInfo], config: AdapterConfig) -> list[LoraTensors]:
    """Every module with its A and B, in canonical order.

    Raises InvalidArgument naming a tensor that is unknown, unused or alone.
    """
    parts: dict[tuple[int, str], dict[str, TensorInfo]] = {}
    keys: dict[tuple[int, str], str] = {}
    for tensor in tensors:
        match = _NAME.fullmatch(tensor.name)
        if match is None:
            _refuse("TENSOR_UNKNOWN", f"the tensor {tensor.name!r} is unknown: no LoRA A or B of a supported module")
        layer, module = int(match["layer"]), match["attention"] or match["mlp"]
        if not config.takes_effect(match["key"], layer):
            _refuse("TENSOR_UNUSED", f"the tensor {tensor.name!r} belongs to a module that the config does not target")
        place = layer, module
        found = parts.setdefault(place, {})
        if match["part"] in found:
            _refuse(
                "TENSOR_DUPLICATE", f"the tensors {found[match['part']].name!r} and {tensor.name!r} are the same one"
            )
        found[match["part"]] = tensor
        keys[place] = match["key"]
    order = sorted(parts, key=lambda place: (place[0], MODULE_INDEX[place[1]]))
    return [_pair(place, keys[place], parts[place], config) for place in order]


def _pair(place: tuple[int, str], key: str, found: dict[str, TensorInfo], config: AdapterConfig) -> LoraTensors:
    if len(found) == 1:
        (part,) = found
        missing = "B" if part == "A" else "A"
        _refuse("TENSOR_MISSING", f"the tensor {found[part].name!r} has no lora_{missing} beside it")
    a, b = found["A"], found["B"]
    lora_rank = config.rank_of(key)
    for tensor, got in ((a, a.shape[0]), (b, b.shape[1])):
        if got != lora_rank:
            message = f"the tensor {tensor.name!r} has rank {got}; the config gives {key} the rank {lora_rank}"
            _refuse("RANK_MISMATCH", message)
    layer, module = place
    return LoraTensors(ModuleSpec(layer, module, lora_rank, config.scaling_of(key), a.shape[1], b.shape[0]), a, b)
