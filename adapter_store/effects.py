"""The load-time proof: reads every weight once, checks that it is finite, and measures what it does."""

import math
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from adapter_store.modules import LoraTensors
from adapter_store.registry import ModuleEffect
from adapter_store.weights import Array, TensorInfo, read_tensor, widen
from common.errors import InvalidArgument
from common.packing import ELEMENT_BYTES, MODULES, ModuleSpec

# The products below are made in blocks of about this many elements: 32 MiB as float64.
_BLOCK_ELEMENTS = 4 * 1024 * 1024

Values = npt.NDArray[np.float64]


class MeasuredWeights:
    """Gives the modules of a weights file one by one and remembers what it saw of them."""

    def __init__(self, file: BinaryIO, modules: Sequence[LoraTensors]) -> None:
        self._file = file
        self._modules = modules
        self._squares: list[float] = []

    def __iter__(self) -> Iterator[tuple[ModuleSpec, Array, Array]]:
        """(spec, A `[lora_rank, in_features]`, B `[out_features, lora_rank]`) in the order given.

        Raises InvalidArgument naming the first tensor that holds NaN or infinity.
        """
        self._squares.clear()
        for module in self._modules:
            a, a_values = self._read(module.a)
            b, b_values = self._read(module.b)
            self._squares.append(module.spec.scaling**2 * squared_norm(a_values, b_values))
            yield module.spec, a, b

    def effects(self) -> tuple[ModuleEffect, ...]:
        """One effect per kind of module, in canonical order; complete after one iteration."""
        return tuple(effect for module in MODULES if (effect := self._effect(module)) is not None)

    def _read(self, tensor: TensorInfo) -> tuple[Array, Values]:
        data = read_tensor(self._file, tensor)
        values = widen(data, tensor.dtype)
        if not np.isfinite(values).all():
            raise InvalidArgument("WEIGHTS_NOT_FINITE", f"the tensor {tensor.name!r} holds NaN or infinity")
        return data, values

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


def squared_norm(a: Values, b: Values) -> float:
    """Squared Frobenius norm of B A for A `[r, in]`, B `[out, r]`.

    ||B A||^2 = sum((B^T B) * (A A^T)): r x r products instead of the out x in delta, unless r is the larger side.
    """
    lora_rank, in_features, out_features = a.shape[0], a.shape[1], b.shape[0]
    total = 0.0
    if lora_rank * lora_rank <= in_features * out_features:
        for rows in _blocks(lora_rank, lora_rank):
            total += float(np.sum((b[:, rows].T @ b) * (a[rows] @ a.T)))
    else:
        for rows in _blocks(out_features, in_features):
            total += float(np.sum((b[rows] @ a) ** 2))
    return max(total, 0.0)


def _blocks(num_rows: int, num_columns: int) -> Iterator[slice]:
    step = max(1, _BLOCK_ELEMENTS // num_columns)
    return (slice(start, start + step) for start in range(0, num_rows, step))
