"""Calls the compiled product."""

import torch
from torch import Tensor

from kernels.cpu.library import DTYPE_CODES, is_plain, kernel, vector_lanes
from kernels.linear.packed import PackedWeight

WEIGHT_DTYPES = (torch.float32, torch.bfloat16)


def supports(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> bool:
    fits = x.dim() == 2 and x.shape[1] == weight.panels.shape[1]
    return fits and weight.dtype in WEIGHT_DTYPES and is_plain(x, weight.panels, bias)


def linear_cpu(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    wide = x.to(torch.float32)
    wide_bias = None if bias is None else bias.to(torch.float32)
    rows, in_features = x.shape
    out = torch.empty(rows, weight.out_features, dtype=torch.float32)
    kernel("linear")(
        wide.data_ptr(),
        weight.panels.data_ptr(),
        DTYPE_CODES[weight.dtype],
        None if wide_bias is None else wide_bias.data_ptr(),
        out.data_ptr(),
        rows,
        in_features,
        weight.out_features,
        vector_lanes(),
        torch.get_num_threads(),
    )
    return out.to(x.dtype)
