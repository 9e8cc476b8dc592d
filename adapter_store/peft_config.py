"""adapter_config.json, read by an own strict parser: what the store understands, and what it refuses by name."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from adapter_store.patterns import Patterns, is_targeted, parse_patterns
from adapter_store.strict_json import parse_object
from common.errors import InvalidArgument
from common.packing import MODULES

MAX_CONFIG_BYTES = 64 * 1024
MAX_DEPTH = 8
MAX_BASE_MODEL_CHARACTERS = 1024
# Far above any trained adapter, far below where float32 logits overflow.
MAX_ALPHA = 1e6

# Settings that change what the adapter computes, in words for the message. Null, false and empty mean off.
REFUSED_SETTINGS = {
    "use_dora": "DoRA adapters are not supported",
    "modules_to_save": "fully trained modules (modules_to_save) are not supported",
    "trainable_token_indices": "trained tokens (trainable_token_indices) are not supported",
    "lora_bias": "a bias of the LoRA layers (lora_bias) is not supported",
    "target_parameters": "LoRA on bare parameters (target_parameters) is not supported",
    "layer_replication": "replicated layers (layer_replication) are not supported",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens) is not supported",
    "use_qalora": "QALoRA adapters are not supported",
    "use_bdlora": "block-diagonal LoRA (use_bdlora) is not supported",
    "arrow_config": "Arrow routing (arrow_config) is not supported",
    "kasa_config": "KaSA adapters (kasa_config) are not supported",
    "monteclora_config": "MonteCLoRA adapters (monteclora_config) are not supported",
    "velora_config": "VeLoRA adapters (velora_config) are not supported",
    "auto_map": "code that comes with an adapter (auto_map) is never run",
}

# Settings that matter in training or to other loaders only.
_IGNORED = frozenset(
    {
        "task_type",
        "auto_mapping",
        "peft_version",
        "revision",
        "inference_mode",
        "lora_dropout",
        "fan_in_fan_out",
        "layers_pattern",
        "megatron_config",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "qalora_group_size",
        "ensure_weight_tying",
        "runtime_config",
    }
)
_READ = frozenset(
    {
        "peft_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "bias",
        "base_model_name_or_path",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "init_lora_weights",
    }
)

# Other initialisations change the base weights too, so that A and B alone are not what was trained.
_PLAIN_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What the store needs of adapter_config.json."""

    lora_rank: int
    lora_alpha: float
    use_rslora: bool
    rank_patterns: Patterns
    alpha_patterns: Patterns
    base_model: str
    # None where PEFT would evaluate a regular expression: then the names of the tensors decide.
    target_modules: tuple[str, ...] | None
    exclude_modules: tuple[str, ...]
    layers_to_transform: tuple[int, ...] | None

    def rank_of(self, key: str) -> int:
        """Rank of the module `key`, such as `model.layers.0.self_attn.q_proj`."""
        return int(self.rank_patterns.value_of(key, self.lora_rank))

    def scaling_of(self, key: str) -> float:
        """What PEFT multiplies B A with in the module `key`."""
        lora_rank, alpha = self.rank_of(key), self.alpha_patterns.value_of(key, self.lora_alpha)
        return alpha / math.sqrt(lora_rank) if self.use_rslora else alpha / lora_rank

    def takes_effect(self, key: str, layer: int) -> bool:
        """Whether PEFT would load tensors of the module `key` at all."""
        if self.target_modules is not None and not is_targeted(key, self.target_modules):
            return False
        if self.layers_to_transform is not None and layer not in self.layers_to_transform:
            return False
        return not is_targeted(key, self.exclude_modules)

    def canonical(self) -> dict[str, Any]:
        """The fields that decide what the adapter computes, in one spelling. Patterns keep their order: it matters."""
        return {
            "peft_type": "LORA",
            "r": self.lora_rank,
            "lora_alpha": self.lora_alpha,
            "use_rslora": self.use_rslora,
            "rank_pattern": list(self.rank_patterns.items),
            "alpha_pattern": list(self.alpha_patterns.items),
            "base_model_name_or_path": self.base_model,
        }


def _refuse(reason: str, message: str) -> NoReturn:
    raise InvalidArgument(reason, f"adapter_config.json: {message}")


def parse_config(data: bytes) -> AdapterConfig:
    """Raises InvalidArgument that names the setting and says why it is refused."""
    raw = parse_object(
        data, what="adapter_config.json", reason="CONFIG_INVALID", max_bytes=MAX_CONFIG_BYTES, max_depth=MAX_DEPTH
    )
    _check_supported(raw)
    return AdapterConfig(
        lora_rank=_rank(raw.get("r"), "r"),
        lora_alpha=_alpha(raw.get("lora_alpha"), "lora_alpha"),
        use_rslora=_flag(raw, "use_rslora"),
        rank_patterns=parse_patterns(raw.get("rank_pattern"), "rank_pattern", _rank),
        alpha_patterns=parse_patterns(raw.get("alpha_pattern"), "alpha_pattern", _alpha),
        base_model=_base_model(raw.get("base_model_name_or_path")),
        target_modules=_targets(raw.get("target_modules")),
        exclude_modules=_names(raw.get("exclude_modules"), "exclude_modules") or (),
        layers_to_transform=_layers(raw.get("layers_to_transform")),
    )


def _check_supported(raw: Mapping[str, Any]) -> None:
    if raw.get("peft_type") != "LORA":
        _refuse("PEFT_TYPE_UNSUPPORTED", f"peft_type is {raw.get('peft_type')!r:.80}; only 'LORA' is supported")
    if raw.get("bias", "none") != "none":
        _refuse("BIAS_UNSUPPORTED", f"bias is {raw['bias']!r:.80}; only 'none' is supported")
    for key, message in REFUSED_SETTINGS.items():
        if raw.get(key):
            _refuse(f"{key.upper()}_UNSUPPORTED", message)
    initialisation = raw.get("init_lora_weights")
    if not any(initialisation is plain or initialisation == plain for plain in _PLAIN_INITIALISATIONS):
        _refuse(
            "INIT_LORA_WEIGHTS_UNSUPPORTED",
            f"init_lora_weights is {initialisation!r:.80}, which changes the base weights too; "
            "save it as plain LoRA (path_initial_model_for_weight_conversion)",
        )
    for key in raw.keys() - _READ - _IGNORED - REFUSED_SETTINGS.keys():
        if raw[key]:
            _refuse("SETTING_UNKNOWN", f"the setting {key[:80]!r} is unknown and not off")


def _rank(value: object, name: str) -> int:
    if type(value) is not int or value < 1:
        _refuse("RANK_INVALID", f"{name} must be an integer of at least 1; it is {value!r:.80}")
    return value


def _alpha(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_ALPHA:
        message = f"{name} must be a number between -{MAX_ALPHA:g} and {MAX_ALPHA:g}; it is {value!r:.80}"
        _refuse("ALPHA_INVALID", message)
    return float(value)


def _flag(raw: Mapping[str, Any], name: str) -> bool:
    value = raw.get(name, False)
    if type(value) is not bool:
        _refuse("CONFIG_INVALID", f"{name} must be true or false; it is {value!r:.80}")
    return value


def _base_model(value: object) -> str:
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > MAX_BASE_MODEL_CHARACTERS:
        _refuse("CONFIG_INVALID", f"base_model_name_or_path must be at most {MAX_BASE_MODEL_CHARACTERS} characters")
    return value


def _names(value: object, name: str) -> tuple[str, ...] | None:
    if value is None or isinstance(value, str):
        return None
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        _refuse("CONFIG_INVALID", f"{name} must be a list of module names")
    return tuple(value)


def _targets(value: object) -> tuple[str, ...] | None:
    names = _names(value, "target_modules")
    for name in names or ():
        if name.rpartition(".")[2] not in MODULES:
            message = f"target module {name[:80]!r} is not supported; these are: {', '.join(MODULES)}"
            _refuse("TARGET_MODULE_UNSUPPORTED", message)
    return names


def _layers(value: object) -> tuple[int, ...] | None:
    if value is None:
        return None
    layers = value if isinstance(value, list) else [value]
    if not all(type(layer) is int for layer in layers):
        _refuse("CONFIG_INVALID", "layers_to_transform must be an integer or a list of integers")
    # PEFT takes an empty list for "all".
    return tuple(layers) or None
