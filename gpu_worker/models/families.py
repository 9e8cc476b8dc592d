"""What a model_type says that its config.json does not: which flags of the one decoder a family sets."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# Both families with windows: what transformers takes when the field is absent.
DEFAULT_SLIDING_WINDOW, DEFAULT_MAX_WINDOW_LAYERS = 4096, 28


def _no_windows(config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    return (0,) * num_layers


def _mistral_windows(config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """Every layer has the window, unless layer_types says which (transformers then loads it as Ministral)."""
    window = _window(config)
    if config.get("layer_types") is not None:
        return _windows_by_type(config["layer_types"], window, num_layers)
    return (window,) * num_layers


def _qwen_windows(config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """The layers from max_window_layers on have the window, unless layer_types says which."""
    window = _window(config) if config.get("use_sliding_window") else 0
    if config.get("layer_types") is not None:
        return _windows_by_type(config["layer_types"], window, num_layers)
    first = _integer(config, "max_window_layers", DEFAULT_MAX_WINDOW_LAYERS, 0)
    return tuple(window if layer >= first else 0 for layer in range(num_layers))


def _window(config: Mapping[str, Any]) -> int:
    """Tokens, 0 = no window."""
    if "sliding_window" in config and config["sliding_window"] is None:
        return 0
    return _integer(config, "sliding_window", DEFAULT_SLIDING_WINDOW, 1)


def _integer(config: Mapping[str, Any], name: str, default: int, lowest: int) -> int:
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise ValueError(f"config.json: {name} is {value!r}; a whole number of at least {lowest} is needed")
    return value


def _windows_by_type(layer_types: Any, window: int, num_layers: int) -> tuple[int, ...]:
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        raise ValueError(f"config.json: layer_types must name the kind of each of the {num_layers} layers")
    if "sliding_attention" in layer_types and not window:
        raise ValueError("config.json: layer_types has 'sliding_attention', but the model has no sliding_window")
    windows = {"full_attention": 0, "sliding_attention": window}
    for layer_type in layer_types:
        if layer_type not in windows:
            raise ValueError(f"layer type {layer_type!r} is not supported; supported: {', '.join(windows)}")
    return tuple(windows[layer_type] for layer_type in layer_types)


@dataclass(frozen=True, slots=True)
class Family:
    """`windows(config, num_layers)` gives the tokens each layer sees, 0 = all."""

    models: str
    # q, k and v have biases whatever config.json says
    qkv_bias: bool = False
    # attention_bias gives q, k, v and o biases
    reads_attention_bias: bool = False
    # mlp_bias gives gate, up and down biases
    reads_mlp_bias: bool = False
    # query and key heads are normalised before they are rotated
    qk_norm: bool = False
    windows: Callable[[Mapping[str, Any], int], tuple[int, ...]] = _no_windows
    # where transformers has a default of its own, so that an absent field cannot be read otherwise
    required_fields: tuple[str, ...] = ()


FAMILIES = {
    "llama": Family("Llama 2, 3", reads_attention_bias=True, reads_mlp_bias=True),
    "mistral": Family("Mistral", windows=_mistral_windows, required_fields=("num_key_value_heads",)),
    "qwen2": Family("Qwen2, Qwen2.5", qkv_bias=True, windows=_qwen_windows, required_fields=("num_key_value_heads",)),
    "qwen3": Family(
        "Qwen3",
        reads_attention_bias=True,
        qk_norm=True,
        windows=_qwen_windows,
        required_fields=("num_key_value_heads", "head_dim"),
    ),
}

_MIXTURE, _GEMMA, _PHI = (
    "a mixture of experts",
    "other norms, activation and scaling",
    "fused projections and partial rotation",
)
WHY_NOT = {
    "mixtral": _MIXTURE,
    "qwen2_moe": _MIXTURE,
    "qwen3_moe": _MIXTURE,
    "gemma": _GEMMA,
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi3": _PHI,
}


def family_of(config: Mapping[str, Any]) -> Family:
    """Raises ValueError that names the model_type, why it is not served, and the families that are."""
    model_type = config.get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is None:
        why = f" ({WHY_NOT[str(model_type)]})" if str(model_type) in WHY_NOT else ""
        served = ", ".join(f"{name} ({family.models})" for name, family in FAMILIES.items())
        raise ValueError(f"model_type {model_type!r}{why} is not supported; supported: {served}")
    for field in family.required_fields:
        if field not in config:
            raise ValueError(f"config.json has no {field!r}")
    return family
