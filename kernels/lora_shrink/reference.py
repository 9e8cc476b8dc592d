"""x A^T in plain PyTorch: the definition of correct."""

import torch
from torch import Tensor

from kernels.adapters import AdapterTables, Segments
from kernels.paged_rows import read_rows, segment_modules


def lora_shrink_reference(
    x: Tensor, adapters: AdapterTables, segments: Segments, layer: int, modules: tuple[int, ...]
) -> Tensor:
    num_tokens, in_features = x.shape
    shrunk = torch.zeros(len(modules), num_tokens, adapters.max_lora_rank, dtype=torch.float32, device=x.device)
    for segment in segment_modules(adapters, segments, layer, modules):
        rows = x[segment.start : segment.end].to(torch.float32)
        for index, lora_rank in enumerate(segment.lora_rank):
            if lora_rank:
                unit = segment.start_unit[index]
                a = read_rows(adapters, segment.adapter, unit, lora_rank, in_features, segment.dtype)
                shrunk[index, segment.start : segment.end, :lora_rank] = rows @ a.to(torch.float32).T
    return shrunk
