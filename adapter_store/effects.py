"""The load-time proof: reads every weight once, checks that it is finite, and measures what it does."""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from adapter_store.lane import Lane
from adapter_store.modules import LoraTensors
from adapter_store.registry import ModuleEffect
from adapter_store.weights import Array, Scratch, TensorInfo, is_finite, read_tensor, widen
from common.errors import InvalidArgument
from common.packing import ELEMENT_BYTES, MODULES, ModuleSpec

# The products below are made in blocks of about this many elements: 16 MiB as float32, twice that as float64.
_BLOCK_ELEMENTS = 4 * 1024 * 1024

# Squared norms between these are made of products that float32 holds without loss.
_LEAST_SQUARE, _MOST_SQUARE = 1e-20, 1e20

Values = npt.NDArray[np.floating]


class MeasuredWeights:
    """Gives the modules of a weights file one by one and remembers what it saw of them."""

    def __init__(self, file: BinaryIO, modules: Sequence[LoraTensors]) -> None:
        self._file = file
        self._modules = modules
        self._squares: list[float] = []
        self._scratch = Scratch(), Scratch()

    def __iter__(self) -> Iterator[tuple[ModuleSpec, Array, Array]]:
        """(spec, A `[lora_rank, in_features]`, B `[out_features, lora_rank]`) in the order given.

        Raises InvalidArgument naming the first tensor that holds NaN or infinity.
        """
        self._squares.clear()
        with Lane() as measuring:
            for module in self._modules:
                a, b = (self._read(tensor) for tensor in (module.a, module.b))
                measuring.give(partial(self._measure, module, a, b))
                yield module.spec, a, b
            measuring.finish()

    def effects(self) -> tuple[ModuleEffect, ...]:
        """One effect per kind of module, in canonical order; complete after one iteration."""
        return tuple(effect for module in MODULES if (effect := self._effect(module)) is not None)

    def _read(self, tensor: TensorInfo) -> Array:
        data = read_tensor(self._file, tensor)
        if not is_finite(data, tensor.dtype):
            raise InvalidArgument("WEIGHTS_NOT_FINITE", f"the tensor {tensor.name!r} holds NaN or infinity")
        return data

    def _measure(self, module: LoraTensors, a: Array, b: Array) -> None:
        square = squared_norm_of_bits(a, b, module.a.dtype, self._scratch)
        self._squares.append(module.spec.scaling**2 * square)

    def _effect(self, module: str) -> ModuleEffect | None:
        of_module = [
            (lora, square)
            for lora, square in zip(self._modules, self._squares, strict=True)
            if lora.spec.module == module
        ]
        if not of_module:
            return None
        ranks = [lora.spec.lora_rank for lora, _ in of_module]
        parameters = sum(
            lora.spec.lora_rank * (lora.spec.in_features + lora.spec.out_features) for lora, _ in of_module
        )
        return ModuleEffect(
            module=module,
            num_layers=len(of_module),
            min_lora_rank=min(ranks),
            max_lora_rank=max(ranks),
            parameter_bytes=parameters * ELEMENT_BYTES[of_module[0][0].a.dtype],
            delta_norm=math.sqrt(sum(square for _, square in of_module)),
        )


def squared_norm_of_bits(
    a: Array, b: Array, dtype: str, scratch: tuple[Scratch, Scratch] | tuple[None, None] = (None, None)
) -> float:
    """`squared_norm` of tensors as they lie in the file.

    Sums of 16-bit values are made in float32, which is off by far less than the values themselves are rounded, and
    again in float64 when float32 does not reach so far.
    """
    narrow = widen(a, dtype, scratch[0]), widen(b, dtype, scratch[1])
    if dtype != "float32":
        with np.errstate(over="ignore", invalid="ignore"):
            square = squared_norm(*narrow)
        if _LEAST_SQUARE < square < _MOST_SQUARE:
            return square
    return squared_norm(*(values.astype(np.float64) for values in narrow))


def squared_norm(a: Values, b: Values) -> float:
    """Squared Frobenius norm of B A for A `[r, in]`, B `[out, r]`.

    ||B A||^2 = sum((B^T B) * (A A^T)): r x r products instead of the out x in delta, unless r is the larger side.
    """
    lora_rank, in_features, out_features = a.shape[0], a.shape[1], b.shape[0]
    total = 0.0
    if lora_rank * lora_rank <= in_features * out_features:
        for rows in _blocks(lora_rank, lora_rank):
            total += float(np.sum((b[:, rows].T @ b) * (a[rows] @ a.T), dtype=np.float64))
    else:
        for rows in _blocks(out_features, in_features):
            total += float(np.sum((b[rows] @ a) ** 2, dtype=np.float64))
    return max(total, 0.0)


def _blocks(num_rows: int, num_columns: int) -> Iterator[slice]:
    step = max(1, _BLOCK_ELEMENTS // num_columns)
    return (slice(start, start + step) for start in range(0, num_rows, step))
