"""One adapter at a time, added into the base weights: W + scaling B A.

Requests are grouped by adapter, the group of the first request first; each group runs to its end as base requests.
Unmerging costs nothing here: the base weights are kept beside.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor

from gpu_worker.models.decoder import Decoder
from gpu_worker.models.weights import LayerWeights, Projection
from kernels.linear import as_rows, prepare

# An adapter's matrices, by (layer, module): A `[lora_rank, in_features]`, B `[out_features, lora_rank]`, scaling
Matrices = dict[tuple[int, str], tuple[Tensor, Tensor, float]]

FUSED = {"qkv": ("q_proj", "k_proj", "v_proj"), "o": ("o_proj",), "gate_up": ("gate_proj", "up_proj")}
FUSED |= {"down": ("down_proj",)}


class Merger:
    """Puts an adapter into a decoder's weights and takes it out again."""

    def __init__(self, model: Decoder) -> None:
        self._model = model
        self._base = model.weights
        # Rows of the base, unpacked once.
        self._rows = [
            {name: as_rows(getattr(layer, name).weight).clone() for name in FUSED} for layer in self._base.layers
        ]

    def merge(self, matrices: Matrices) -> None:
        layers = tuple(self._merged(number, layer, matrices) for number, layer in enumerate(self._base.layers))
        self._model.weights = replace(self._base, layers=layers)

    def unmerge(self) -> None:
        self._model.weights = self._base

    def _merged(self, number: int, layer: LayerWeights, matrices: Matrices) -> LayerWeights:
        changed: dict[str, Any] = {}
        for name, modules in FUSED.items():
            if any((number, module) in matrices for module in modules):
                changed[name] = self._projection(getattr(layer, name), number, name, matrices)
        return replace(layer, **changed)

    def _projection(self, projection: Projection, number: int, name: str, matrices: Matrices) -> Projection:
        rows = self._rows[number][name].clone()
        for module, part in zip(FUSED[name], rows.split_with_sizes(projection.out_features), strict=True):
            if (number, module) in matrices:
                a, b, scaling = matrices[number, module]
                part.addmm_(b, a, alpha=scaling)
        return replace(projection, weight=prepare(rows))
