"""linear: the product with a base weight."""

from torch import Tensor

from kernels import dispatch
from kernels.linear import cpu
from kernels.linear.packed import PackedWeight, pack
from kernels.linear.reference import linear_reference

__all__ = ["PackedWeight", "linear", "pack"]


def linear(x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias.

    x: `[num_tokens, in_features]`. weight: `[out_features, in_features]`, packed for the compiled kernel. bias:
    `[out_features]`. Returns `[num_tokens, out_features]` in x's dtype; the compiled kernel sums in float32 and rounds
    once.
    """
    supported = isinstance(weight, PackedWeight) and cpu.supports(x, weight, bias)
    runs_compiled = dispatch.use_cpu("linear", supported)
    if isinstance(weight, PackedWeight):
        if runs_compiled:
            return cpu.linear_cpu(x, weight, bias)
        weight = weight.unpacked()
    return linear_reference(x, weight, bias)
