"""The rotary embedding that a config.json asks for."""

import math
from collections.abc import Mapping
from typing import Any

from gpu_worker.models.rope import DynamicScaling, LinearScaling, Llama3Scaling, RopeConfig, YarnScaling

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")


def read_rope(config: Mapping[str, Any], max_positions: int) -> RopeConfig:
    """Reads rope_parameters (transformers 5), or rope_theta and rope_scaling (4); the older files write `type`.

    max_positions: config.json's max_position_embeddings.
    Raises ValueError that names the kind or the field for a kind that is not supported, a missing field, and a value
    that is not a number above 0.
    """
    parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(parameters, Mapping) or any(isinstance(value, Mapping) for value in parameters.values()):
        raise ValueError("config.json: rope_parameters must be one object of numbers for all layers")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope type {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    rotated = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if rotated not in (None, 1.0):
        raise ValueError(f"partial_rotary_factor {rotated} is not supported; supported: 1.0")
    theta = _number(parameters, "rope_theta", _number(config, "rope_theta", 10000.0))
    if theta <= 1:
        raise ValueError(f"config.json: rope_theta is {theta}; a number above 1 is needed")
    if kind == "default":
        return RopeConfig(theta)
    # Written at the top by some converters; transformers lets that one win.
    original = _number(config, "original_max_position_embeddings", 0.0) or _number(
        parameters, "original_max_position_embeddings", float(max_positions)
    )
    try:
        return RopeConfig(theta, _scaling(kind, parameters, max_positions, int(original)))
    except KeyError as error:
        raise ValueError(f"config.json: rope type {kind!r} has no {error.args[0]!r}") from None


def _scaling(
    kind: str, parameters: Mapping[str, Any], max_positions: int, original: int
) -> LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling:
    if kind == "yarn":
        return _yarn(parameters, max_positions, original)
    factor = _number(parameters, "factor")
    if kind == "linear":
        return LinearScaling(factor)
    if kind == "dynamic":
        # transformers grows from max_position_embeddings, whatever else the file says
        return DynamicScaling(factor, max_positions)
    low, high = _number(parameters, "low_freq_factor"), _number(parameters, "high_freq_factor")
    if high <= low:
        raise ValueError(f"config.json: high_freq_factor is {high}; a number above low_freq_factor, {low}, is needed")
    return Llama3Scaling(factor, low, high, original)


def _yarn(parameters: Mapping[str, Any], max_positions: int, original: int) -> YarnScaling:
    # null, unlike absent, means the ratio of the two lengths
    factor = max_positions / original if parameters["factor"] is None else _number(parameters, "factor")
    mscale, mscale_all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        magnitude = _mscale(factor, _number(parameters, "mscale"))
        magnitude /= _mscale(factor, _number(parameters, "mscale_all_dim"))
    else:
        magnitude = _mscale(factor, 1.0)
    return YarnScaling(
        factor=factor,
        original_max_positions=original,
        attention_factor=_number(parameters, "attention_factor", magnitude),
        beta_fast=_number(parameters, "beta_fast", 32.0),
        beta_slow=_number(parameters, "beta_slow", 1.0),
        truncate=bool(parameters.get("truncate", True)),
    )


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _number(fields: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """Null counts as absent. Raises KeyError when it is absent and has no default, ValueError when it is no number."""
    value = fields.get(name)
    if value is None:
        if default is None:
            raise KeyError(name)
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"config.json: {name} is {value!r}; a number above 0 is needed")
    return float(value)
