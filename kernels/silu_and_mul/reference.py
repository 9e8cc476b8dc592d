"""The gated activation in plain PyTorch: the definition of correct."""

import torch.nn.functional as F
from torch import Tensor


def silu_and_mul_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
