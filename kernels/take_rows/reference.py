"""Rows in plain PyTorch: the definition of correct."""

from torch import Tensor

from kernels.linear.packed import PANEL, PackedWeight


def take_rows_reference(source: Tensor | PackedWeight, rows: Tensor) -> Tensor:
    if isinstance(source, PackedWeight):
        return source.panels[rows // PANEL, :, rows % PANEL]
    return source.index_select(0, rows)
