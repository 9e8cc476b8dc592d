"""linear: the product with a base weight."""

from torch import Tensor

from kernels import dispatch
from kernels.gpu import tiles
from kernels.linear import cpu
from kernels.linear.packed import PackedWeight, pack
from kernels.linear.reference import linear_reference

__all__ = ["PackedWeight", "Weight", "as_rows", "linear", "pack", "prepare"]

# [out_features, in_features], as rows or in panels
Weight = Tensor | PackedWeight


def prepare(weight: Weight) -> Weight:
    """The form that `linear` reads fastest on this device; the memory of `weight` may be reused, see `pack`."""
    if isinstance(weight, PackedWeight) or weight.dtype not in cpu.WEIGHT_DTYPES:
        return weight
    return pack(weight) if weight.is_cpu and dispatch.available() else weight


def as_rows(weight: Weight) -> Tensor:
    """`[out_features, in_features]`; a copy when it is packed."""
    return weight.unpacked() if isinstance(weight, PackedWeight) else weight


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias.

    x: `[num_tokens, in_features]`. weight: `[out_features, in_features]`, packed for the compiled kernel. bias:
    `[out_features]`. Returns `[num_tokens, out_features]` in x's dtype; the compiled kernel sums in float32 and rounds
    once.
    """
    if dispatch.use_triton("linear", x, by_default=tiles.is_deterministic()):
        from kernels.linear.triton import linear_triton

        return linear_triton(x, as_rows(weight), bias)
    supported = isinstance(weight, PackedWeight) and cpu.supports(x, weight, bias)
    if dispatch.use_cpu("linear", supported) and isinstance(weight, PackedWeight):
        return cpu.linear_cpu(x, weight, bias)
    return linear_reference(x, as_rows(weight), bias)
