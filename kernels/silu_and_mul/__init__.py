"""silu_and_mul: the gate of the MLP."""

from torch import Tensor

from kernels import dispatch
from kernels.silu_and_mul import cpu
from kernels.silu_and_mul.reference import silu_and_mul_reference


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up.

    gate_up: `[num_tokens, 2 * intermediate]`, gate first. Returns `[num_tokens, intermediate]` in its dtype, rounded
    after silu and after the product as transformers' LlamaMLP does.
    """
    if dispatch.use_triton("silu_and_mul", gate_up):
        from kernels.silu_and_mul.triton import silu_and_mul_triton

        return silu_and_mul_triton(gate_up)
    if dispatch.use_cpu("silu_and_mul", cpu.supports(gate_up)):
        return cpu.silu_and_mul_cpu(gate_up)
    return silu_and_mul_reference(gate_up)
