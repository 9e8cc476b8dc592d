"""The header of adapter_model.safetensors, read by an own strict parser.

    8 bytes            N bytes                                   the rest
    N, little endian | {"NAME": {"dtype", "shape", "data_offsets"}, ..} | tensors, without gap or overlap

What this parser accepts is a subset of what the safetensors library accepts.
"""

import struct
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn

import numpy as np
import numpy.typing as npt

from adapter_store.strict_json import parse_object
from common.errors import InvalidArgument
from common.packing import ELEMENT_BYTES

MAX_HEADER_BYTES = 2 * 1024 * 1024
MAX_TENSORS = 14 * 1024
MAX_NAME_CHARACTERS = 256
# The outer object, a tensor, its shape.
_MAX_DEPTH = 3

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# numpy has no bfloat16: its bits travel as unsigned integers.
ELEMENTS = {"float32": "<f4", "bfloat16": "<u2", "float16": "<f2"}
# Bits of each dtype.
_SIGN = {"float32": 1 << 31, "bfloat16": 1 << 15, "float16": 1 << 15}
_INFINITY = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00}

Array = npt.NDArray[np.generic]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of rank 2; `start` and `end` are byte offsets in the file."""

    name: str
    dtype: str
    shape: tuple[int, int]
    start: int
    end: int


def _refuse(message: str) -> NoReturn:
    raise InvalidArgument("WEIGHTS_INVALID", f"adapter_model.safetensors: {message}")


class Scratch:
    """Memory for float32 values that is used again: fresh pages from the system cost more than what is done in them."""

    def __init__(self) -> None:
        self._values = np.empty(0, np.float32)

    def take(self, count: int) -> npt.NDArray[np.float32]:
        """So many values `[count]`, whatever they are; those taken before are lost."""
        if self._values.size < count:
            self._values = np.empty(count, np.float32)
        return self._values[:count]


def read_header(file: BinaryIO, file_bytes: int) -> list[TensorInfo]:
    """The tensors in order of their place in the file. Raises InvalidArgument; allocates at most the header's limit."""
    prefix = file.read(8)
    if len(prefix) < 8:
        _refuse(f"{file_bytes} bytes are too few for a safetensors file")
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER_BYTES:
        _refuse(f"the header claims {length} bytes; the limit is {MAX_HEADER_BYTES} (is this a safetensors file?)")
    header = file.read(length)
    if len(header) < length:
        _refuse(f"the header claims {length} bytes; the file ends after {len(header)} of them")
    if not header.startswith(b"{"):
        _refuse("the header does not start with '{'")
    entries = parse_object(
        header,
        what="adapter_model.safetensors: the header",
        reason="WEIGHTS_INVALID",
        max_bytes=MAX_HEADER_BYTES,
        max_depth=_MAX_DEPTH,
    )
    _check_metadata(entries.pop("__metadata__", {}))
    if not 0 < len(entries) <= MAX_TENSORS:
        _refuse(f"{len(entries)} tensors; there must be 1 to {MAX_TENSORS}")
    data_start = 8 + length
    tensors = [_tensor(name, entry, data_start) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    _check_places(tensors, data_start, file_bytes)
    _check_one_dtype(tensors)
    return tensors


def read_tensor(file: BinaryIO, tensor: TensorInfo) -> Array:
    """The elements `[rows, columns]`; bfloat16 as uint16."""
    file.seek(tensor.start)
    rows, columns = tensor.shape
    data = np.fromfile(file, dtype=ELEMENTS[tensor.dtype], count=rows * columns)
    if data.size != rows * columns:
        _refuse(f"the file ends inside the tensor {tensor.name}")
    return data.reshape(rows, columns)


def widen(data: Array, dtype: str, scratch: Scratch | None = None) -> npt.NDArray[np.float32]:
    """The values of a tensor whose bits are `data`, as float32 `[rows, columns]`; in `scratch`, if there is one and it
    is needed, until it is used again."""
    if dtype == "float32":
        return data.astype(np.float32, copy=False)
    wide = (scratch or Scratch()).take(data.size).reshape(data.shape)
    if dtype == "bfloat16":
        np.left_shift(data, 16, out=wide.view(np.uint32), dtype=np.uint32)
    else:
        wide[...] = data
    return wide


def is_finite(data: Array, dtype: str) -> bool:
    """Whether no value of a tensor whose bits are `data` is NaN or infinite.

    Without the sign, the bits of values are in the order of the values, infinity and NaN last. Read as signed integers
    those of positive values are the largest, read as unsigned ones those of negative values: nothing is copied.
    """
    infinity, size = _INFINITY[dtype], data.itemsize
    return bool(data.view(f"<i{size}").max() < infinity and data.view(f"<u{size}").max() < _SIGN[dtype] | infinity)


def _check_metadata(metadata: object) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _refuse("__metadata__ must map names to strings")


def _tensor(name: str, entry: Any, data_start: int) -> TensorInfo:
    if len(name) > MAX_NAME_CHARACTERS:
        _refuse(f"a tensor's name has {len(name)} characters; the limit is {MAX_NAME_CHARACTERS}")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        _refuse(f"the tensor {name!r} must have dtype, shape and data_offsets, and nothing else")
    dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        _refuse(f"the tensor {name!r} has the dtype {entry['dtype']!r:.80}; supported are {', '.join(_DTYPES)}")
    shape, offsets = _pair(entry["shape"]), _pair(entry["data_offsets"])
    if shape is None or min(shape) < 1:
        _refuse(f"the tensor {name!r} has the shape {entry['shape']!r:.80}; two sizes of at least 1 belong there")
    if offsets is None or not 0 <= offsets[0] <= offsets[1]:
        _refuse(
            f"the tensor {name!r} has the data_offsets {entry['data_offsets']!r:.80}; a start and an end belong there"
        )
    expected = shape[0] * shape[1] * ELEMENT_BYTES[dtype]
    if offsets[1] - offsets[0] != expected:
        _refuse(f"the tensor {name!r} spans {offsets[1] - offsets[0]} bytes; its shape and dtype need {expected}")
    return TensorInfo(name, dtype, shape, data_start + offsets[0], data_start + offsets[1])


def _pair(value: object) -> tuple[int, int] | None:
    if isinstance(value, list) and len(value) == 2 and all(type(item) is int for item in value):
        return value[0], value[1]
    return None


def _check_places(tensors: list[TensorInfo], data_start: int, file_bytes: int) -> None:
    end = data_start
    for tensor in tensors:
        if tensor.start != end:
            kind = "overlaps the tensor before it" if tensor.start < end else "leaves a gap before it"
            _refuse(f"the tensor {tensor.name!r} {kind}: it starts at byte {tensor.start}, not {end}")
        end = tensor.end
    if end != file_bytes:
        _refuse(f"the tensors end at byte {end}; the file has {file_bytes} bytes")


def _check_one_dtype(tensors: list[TensorInfo]) -> None:
    first = tensors[0]
    for tensor in tensors:
        if tensor.dtype != first.dtype:
            _refuse(f"the tensor {tensor.name!r} is {tensor.dtype}, {first.name!r} is {first.dtype}; all must be one")
