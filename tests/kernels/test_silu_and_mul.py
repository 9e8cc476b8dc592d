import pytest
import torch
from torch import Tensor

from kernels.silu_and_mul import silu_and_mul

pytestmark = pytest.mark.usefixtures("backend")


def expected(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """silu(gate) * up in float64, and its bound: the exponential (2 units), the sum and the division in float32, and
    two roundings to the dtype; float16 may lose half a subnormal step in silu, which is multiplied by `up`."""
    gate, up = gate_up.double().chunk(2, dim=1)
    values, dtype = gate / (1 + (-gate).exp()) * up, torch.finfo(gate_up.dtype)
    relative = 4 * torch.finfo(torch.float32).eps + 2 * dtype.eps
    return values, relative * values.abs() + dtype.smallest_normal * dtype.eps * (1 + up.abs())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("intermediate", [1, 63, 100, 2100], ids=lambda size: f"intermediate-{size}")
@pytest.mark.parametrize("num_tokens", [1, 7, 33], ids=lambda count: f"{count}-tokens")
def test_gates(num_tokens: int, intermediate: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    gate_up = (4 * torch.randn(num_tokens, 2 * intermediate, generator=generator)).to(dtype)
    values, bounds = expected(gate_up)
    out = silu_and_mul(gate_up)
    assert out.dtype == dtype
    assert ((out - values).abs() <= bounds).all()


def test_gate_and_up_are_not_interchangeable() -> None:
    assert silu_and_mul(torch.tensor([[1.0, 2.0]])) != silu_and_mul(torch.tensor([[2.0, 1.0]]))
