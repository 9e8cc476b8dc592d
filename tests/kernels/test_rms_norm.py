import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from kernels.rms_norm import rms_norm
from kernels.rms_norm.reference import rms_norm_reference

pytestmark = pytest.mark.usefixtures("backend")

NORM_EPS = 1e-5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def expected(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The normalised x in float64, and its bound: half the relative error of a float32 sum of `hidden` squares, the
    root, its inverse and the product (4 more), then two roundings to the dtype; float16 may add one subnormal step in
    each of them."""
    wide, eps = x.double(), torch.finfo(x.dtype).eps
    values = weight.double() * wide / (wide.square().mean(-1, keepdim=True) + NORM_EPS).sqrt()
    relative = (x.shape[1] / 2 + 4) * torch.finfo(torch.float32).eps + 2 * eps
    return values, relative * values.abs() + 4 * torch.finfo(x.dtype).smallest_normal * eps


@pytest.mark.parametrize("has_residual", [False, True], ids=["alone", "with-residual"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [1, 63, 100, 256], ids=lambda hidden: f"hidden-{hidden}")
@pytest.mark.parametrize("num_tokens", [1, 7, 33], ids=lambda count: f"{count}-tokens")
def test_normalises_the_sum(
    num_tokens: int, hidden: int, dtype: torch.dtype, has_residual: bool, generator: torch.Generator
) -> None:
    x, addend = (3 * torch.randn(2, num_tokens, hidden, generator=generator)).to(dtype).unbind(0)
    weight = torch.randn(hidden, generator=generator).to(dtype)
    normed, residual = rms_norm(x, weight, NORM_EPS, addend if has_residual else None)
    total = x.double() + addend.double() if has_residual else x.double()
    eps = torch.finfo(dtype).eps
    assert ((residual - total).abs() <= eps / 2 * total.abs()).all()  # rounded once
    values, bounds = expected(residual, weight)
    assert ((normed - values).abs() <= bounds).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_reference_equals_transformers_bit_for_bit(dtype: torch.dtype, generator: torch.Generator) -> None:
    x, addend = torch.randn(2, 33, 100, generator=generator).to(dtype).unbind(0)
    theirs = LlamaRMSNorm(100, NORM_EPS).to(dtype)
    theirs.weight.data.copy_(torch.randn(100, generator=generator))
    normed, residual = rms_norm_reference(x, theirs.weight.data, NORM_EPS, addend)
    assert torch.equal(residual, addend + x)
    assert torch.equal(normed, theirs(addend + x).detach())


def test_the_input_is_left_alone(generator: torch.Generator) -> None:
    x, addend = torch.randn(2, 7, 8, generator=generator).unbind(0)
    before = x.clone(), addend.clone()
    rms_norm(x, torch.ones(8), NORM_EPS, addend)
    assert torch.equal(x, before[0])
    assert torch.equal(addend, before[1])
