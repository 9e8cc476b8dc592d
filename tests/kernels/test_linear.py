import pytest
import torch
from torch import Tensor

from kernels import dispatch
from kernels.linear import cpu, linear, pack

EPS = torch.finfo(torch.float32).eps


def expected(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """x W^T + bias in float64, and the bound of float32: n products, in whatever order, and the bias round n + 1 times
    by half a unit of at most the sum of magnitudes."""
    addend = torch.zeros(1, dtype=torch.float64) if bias is None else bias.double()
    values = x.double() @ weight.double().T + addend
    magnitude = x.double().abs() @ weight.double().abs().T + addend.abs()
    return values, (x.shape[1] + 1) * EPS / 2 * magnitude


@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("out_features", [1, 37, 192], ids=lambda size: f"out-{size}")
@pytest.mark.parametrize("in_features", [1, 63, 700], ids=lambda size: f"in-{size}")
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 5, 7, 13, 200], ids=lambda count: f"{count}-tokens")
def test_multiplies(
    num_tokens: int,
    in_features: int,
    out_features: int,
    weight_dtype: torch.dtype,
    has_bias: bool,
    generator: torch.Generator,
) -> None:
    x = torch.randn(num_tokens, in_features, generator=generator)
    weight = torch.randn(out_features, in_features, generator=generator).to(weight_dtype)
    bias = torch.randn(out_features, generator=generator) if has_bias else None
    values, bounds = expected(x, weight, bias)
    with dispatch.force("cpu"):
        out = linear(x, pack(weight.clone()), bias)
    assert out.dtype == torch.float32
    assert ((out - values).abs() <= bounds).all()


def test_bfloat16_rounds_once(generator: torch.Generator) -> None:
    x, weight = (torch.randn(33, 100, generator=generator).bfloat16() for _ in range(2))
    with dispatch.force("cpu"):
        out, wide = linear(x, pack(weight.clone())), linear(x.float(), pack(weight.clone()))
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, wide.bfloat16())


def test_the_width_of_vectors_changes_no_bit(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(33, 300, generator=generator)
    weight = pack(torch.randn(100, 300, generator=generator))
    wide = linear(x, weight)
    monkeypatch.setattr(cpu, "vector_lanes", lambda: 8)
    assert torch.equal(linear(x, weight), wide)


@pytest.mark.parametrize("out_features", [16, 37, 2000], ids=lambda size: f"out-{size}")
def test_packing_turns_panels(out_features: int, generator: torch.Generator) -> None:
    weight = torch.randn(out_features, 7, generator=generator)
    packed = pack(weight.clone())
    assert torch.equal(packed.unpacked(), weight)


def test_packing_reuses_the_memory() -> None:
    weight = torch.randn(64, 8)
    assert pack(weight).panels.data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("is_packed", [False, True], ids=["rows", "packed"])
def test_the_reference_takes_either_form(is_packed: bool, generator: torch.Generator) -> None:
    x, weight = torch.randn(3, 8, generator=generator), torch.randn(32, 8, generator=generator)
    with dispatch.force("reference"):
        out = linear(x, pack(weight.clone()) if is_packed else weight)
    assert torch.equal(out, torch.nn.functional.linear(x, weight))
