"""From one element type to another, as bits: numpy has no bfloat16."""

from typing import Any

import numpy as np
import numpy.typing as npt

from adapter_store.weights import ELEMENTS, Array


def convert(bits: Array, source: str, target: str) -> Array:
    """The nearest values (ties to even) in another dtype; `bits` is of any shape, bfloat16 as uint16.

    Raises ValueError when a value is too large for `target`.
    """
    if source == target:
        return bits
    values = _to_float32(bits, source)
    with np.errstate(over="ignore"):
        converted: Any = _to_bfloat16(values) if target == "bfloat16" else values.astype(ELEMENTS[target])
    if not np.isfinite(_to_float32(converted, target)).all():
        raise ValueError(f"a value is too large for {target}")
    result: Array = converted
    return result


def _to_float32(bits: Array, dtype: str) -> npt.NDArray[np.float32]:
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.astype(np.float32)


def _to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    whole = np.ascontiguousarray(values).view(np.uint32)
    # Half of the last kept bit, and one less when that bit is even.
    return ((whole + 0x7FFF + ((whole >> 16) & 1)) >> 16).astype(np.uint16)
