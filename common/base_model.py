"""What a checkpoint folder says about its base model, read without torch: geometry, fingerprint, tokenizer files."""

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Files a gateway needs to tokenise and to render chats; only the first must exist.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
MAX_HEADER_BYTES = 100 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class BaseGeometry:
    """Sizes of a decoder, in elements."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_context_tokens: int

    @property
    def module_shapes(self) -> dict[str, tuple[int, int]]:
        """(in_features, out_features) of each linear layer a LoRA adapter can change."""
        query, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden_size, query),
            "k_proj": (self.hidden_size, kv),
            "v_proj": (self.hidden_size, kv),
            "o_proj": (query, self.hidden_size),
            "gate_proj": (self.hidden_size, self.intermediate_size),
            "up_proj": (self.hidden_size, self.intermediate_size),
            "down_proj": (self.intermediate_size, self.hidden_size),
        }


def read_config(model_dir: Path) -> dict[str, Any]:
    """config.json as a dictionary. Raises ValueError that names the file when it is missing or not an object."""
    path = model_dir / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: is {model_dir} a Hugging Face checkpoint folder?") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return config


def geometry(config: Mapping[str, Any]) -> BaseGeometry:
    """Raises ValueError naming the first field that is missing."""
    try:
        hidden_size, num_heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        return BaseGeometry(
            num_layers=int(config["num_hidden_layers"]),
            hidden_size=hidden_size,
            intermediate_size=int(config["intermediate_size"]),
            num_heads=num_heads,
            num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
            head_dim=int(config.get("head_dim") or hidden_size // num_heads),
            vocab_size=int(config["vocab_size"]),
            max_context_tokens=int(config["max_position_embeddings"]),
        )
    except KeyError as error:
        raise ValueError(f"config.json has no {error.args[0]!r}") from None


def eos_token_ids(model_dir: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """End-of-sequence ids of generation_config.json, else of config.json; each writes one id or a list."""
    generation_path = model_dir / "generation_config.json"
    found = None
    if generation_path.exists():
        found = json.loads(generation_path.read_text(encoding="utf-8")).get("eos_token_id")
    if found is None:
        found = config.get("eos_token_id")
    if found is None:
        return ()
    return tuple(found) if isinstance(found, list) else (int(found),)


def weight_files(model_dir: Path) -> list[Path]:
    """The safetensors files of a checkpoint, single or sharded, sorted.

    Raises ValueError naming the file when a shard of the index is missing or there are no weights.
    """
    index = model_dir / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [model_dir / name for name in names]
        for file in files:
            if file.parent != model_dir or not file.is_file():
                raise ValueError(f"shard {file.name} of {index.name} is missing in {model_dir}")
        return files
    single = model_dir / "model.safetensors"
    if not single.is_file():
        raise ValueError(f"{model_dir} holds neither {single.name} nor {index.name}; other weight formats are refused")
    return [single]


def fingerprint(model_dir: Path) -> str:
    """sha256, hex, over config.json and the header of each safetensors file."""
    digest = hashlib.sha256((model_dir / "config.json").read_bytes())
    for path in weight_files(model_dir):
        digest.update(_header(path))
    return digest.hexdigest()


def _header(path: Path) -> bytes:
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise ValueError(f"{path} is too short to be a safetensors file")
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"{path} claims a header of {length} bytes; the limit is {MAX_HEADER_BYTES}")
        return prefix + file.read(length)


def tokenizer_files(directory: Path) -> dict[str, bytes]:
    """Name -> content of the tokenizer files. Raises ValueError when tokenizer.json is missing."""
    if not (directory / TOKENIZER_FILES[0]).is_file():
        raise ValueError(f"{directory} holds no {TOKENIZER_FILES[0]}: a fast tokenizer is needed")
    return {name: (directory / name).read_bytes() for name in TOKENIZER_FILES if (directory / name).is_file()}


def tokenizer_digest(files: Mapping[str, bytes]) -> str:
    """sha256, hex, over names and contents in order of name."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\0{len(files[name])}\0".encode())
        digest.update(files[name])
    return digest.hexdigest()
