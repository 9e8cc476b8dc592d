"""scaling * shrunk B in plain PyTorch: the definition of correct."""

import torch
from torch import Tensor

from kernels.adapters import AdapterTables, Segments
from kernels.paged_rows import read_rows, row_units, segment_modules


def lora_expand_reference(
    shrunk: Tensor,
    adapters: AdapterTables,
    segments: Segments,
    layer: int,
    modules: tuple[int, ...],
    in_features: int,
    out_features: tuple[int, ...],
    out: Tensor,
) -> None:
    columns = out.split_with_sizes(out_features, dim=1)
    for segment in segment_modules(adapters, segments, layer, modules):
        tokens = slice(segment.start, segment.end)
        a_row_units = row_units(in_features, segment.dtype)
        for index, (lora_rank, features) in enumerate(zip(segment.lora_rank, out_features, strict=True)):
            if lora_rank:
                unit = segment.start_unit[index] + lora_rank * a_row_units
                b = read_rows(adapters, segment.adapter, unit, lora_rank, features, segment.dtype)
                delta = shrunk[index, tokens, :lora_rank] @ b.to(torch.float32)
                columns[index][tokens].add_(delta, alpha=segment.scaling[index])
