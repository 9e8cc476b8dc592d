"""Rotary position embedding: the table of cosines and sines.

Frequencies as in transformers' `modeling_rope_utils.py`, in its order of float32 operations, so that float32 models
match bit for bit.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1's stretching: long wavelengths are divided by `factor`, short ones kept, the rest interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """`llama3` None is the default kind."""

    theta: float
    llama3: Llama3Scaling | None = None


def cos_sin_table(rope: RopeConfig, head_dim: int, max_positions: int, device: str | torch.device = "cpu") -> Tensor:
    """`[max_positions, 2, head_dim / 2]` float32, 0 = cosine, 1 = sine, as `kernels.store_kv` takes it."""
    angles = torch.arange(max_positions, dtype=torch.float32)[:, None] * _inverse_frequencies(rope, head_dim)
    return torch.stack((angles.cos(), angles.sin()), dim=1).to(device)


def _inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """`[head_dim / 2]` float32, radians per position."""
    inverse = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    return inverse if rope.llama3 is None else _stretch(inverse, rope.llama3)


def _stretch(inverse: Tensor, scaling: Llama3Scaling) -> Tensor:
    old, low, high = scaling.original_max_positions, scaling.low_freq_factor, scaling.high_freq_factor
    wavelength = 2 * math.pi / inverse
    stretched = torch.where(wavelength > old / low, inverse / scaling.factor, inverse)
    smooth = (old / wavelength - low) / (high - low)
    between = (1 - smooth) * stretched / scaling.factor + smooth * stretched
    is_between = (wavelength >= old / high) & (wavelength <= old / low)
    return torch.where(is_between, between, stretched)
