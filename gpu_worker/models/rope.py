"""Rotary position embedding: the table of cosines and sines.

Frequencies as in transformers' `modeling_rope_utils.py`, in its order of float32 operations, so that the tables match
bit for bit; that of the dynamic kind to the last place of a frequency.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Every position is divided by `factor` (Chen et al. 2023, "position interpolation")."""

    factor: float


@dataclass(frozen=True, slots=True)
class DynamicScaling:
    """Theta grows with the length beyond `original_max_positions` ("dynamic NTK").

    transformers takes the frequencies of a whole call from its longest position, leaves the keys of earlier calls as
    they were, and so gives a prompt other values when it comes in other pieces. Here position p has the frequencies
    of length p + 1, always: what transformers computes up to the original length and for every token it decodes one
    by one, and the same for a prompt however it is cut, batched, shared or resumed.
    """

    factor: float
    original_max_positions: int


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1's stretching: long wavelengths are divided by `factor`, short ones kept, the rest interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN (Peng et al. 2023): as llama3 with a ramp over the dimensions, and longer queries and keys.

    `attention_factor` multiplies cosines and sines. The ramp runs between the dimensions that turn `beta_fast` and
    `beta_slow` times in the original length, whole dimensions when `truncate`.
    """

    factor: float
    original_max_positions: int
    attention_factor: float
    beta_fast: float
    beta_slow: float
    truncate: bool


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """`scaling` None is the default kind."""

    theta: float
    scaling: LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling | None = None


def cos_sin_table(rope: RopeConfig, head_dim: int, max_positions: int, device: str | torch.device = "cpu") -> Tensor:
    """`[max_positions, 2, head_dim / 2]` float32, 0 = cosine, 1 = sine, as `kernels.store_kv` takes it."""
    positions = torch.arange(max_positions, dtype=torch.float32)[:, None]
    angles = positions * _inverse_frequencies(rope, head_dim, positions)
    magnitude = rope.scaling.attention_factor if isinstance(rope.scaling, YarnScaling) else 1.0
    return torch.stack((angles.cos() * magnitude, angles.sin() * magnitude), dim=1).to(device)


def _inverse_frequencies(rope: RopeConfig, head_dim: int, positions: Tensor) -> Tensor:
    """`[head_dim / 2]`, or `[max_positions, head_dim / 2]` when they depend on it; float32, radians per position."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    match rope.scaling:
        case None:
            return 1.0 / rope.theta**exponents
        case LinearScaling(factor):
            return 1.0 / rope.theta**exponents / factor
        case DynamicScaling():
            return 1.0 / _growing_theta(rope.theta, rope.scaling, head_dim, positions) ** exponents
        case Llama3Scaling():
            return _stretch(1.0 / rope.theta**exponents, rope.scaling)
        case YarnScaling():
            return _ramp(rope.theta, exponents, head_dim, rope.scaling)


def _growing_theta(theta: float, scaling: DynamicScaling, head_dim: int, positions: Tensor) -> Tensor:
    """`[max_positions, 1]` float32."""
    length = (positions + 1).clamp(min=scaling.original_max_positions)
    growth = scaling.factor * length / scaling.original_max_positions - (scaling.factor - 1)
    return theta * growth ** (head_dim / (head_dim - 2))


def _stretch(inverse: Tensor, scaling: Llama3Scaling) -> Tensor:
    old, low, high = scaling.original_max_positions, scaling.low_freq_factor, scaling.high_freq_factor
    wavelength = 2 * math.pi / inverse
    stretched = torch.where(wavelength > old / low, inverse / scaling.factor, inverse)
    smooth = (old / wavelength - low) / (high - low)
    between = (1 - smooth) * stretched / scaling.factor + smooth * stretched
    is_between = (wavelength >= old / high) & (wavelength <= old / low)
    return torch.where(is_between, between, stretched)


def _ramp(theta: float, exponents: Tensor, head_dim: int, scaling: YarnScaling) -> Tensor:
    wavelengths = theta**exponents
    low, high = (
        head_dim * math.log(scaling.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (scaling.beta_fast, scaling.beta_slow)
    )
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a step instead of a ramp, without dividing by zero
    kept = 1 - ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return 1.0 / (scaling.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept
