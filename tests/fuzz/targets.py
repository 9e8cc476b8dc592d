"""What is fuzzed, and what must hold for every input. Any other exception than a refusal is a finding."""

import json
import math
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import safetensors

from adapter_store.peft_config import parse_config
from adapter_store.weights import MAX_HEADER_BYTES, read_header
from common.errors import InvalidArgument
from tests.fuzz.seeds import config_seeds, header_seeds

KEY = "model.layers.1.self_attn.q_proj"
# Of the mutations of a weights file, this share keeps the length of the header true.
TRUE_LENGTH_SHARE = 0.85

Mutate = Callable[[bytes, int], bytes]


@dataclass
class Counts:
    """Inputs in all, those that got to the parser proper, and those accepted."""

    inputs: int = 0
    parsed: int = 0
    accepted: int = 0


@dataclass(frozen=True)
class Target:
    """`run(data, counts)` raises on a finding; `mutate` makes a new input; `parser` names what must be covered."""

    run: Callable[[bytes, Counts], None]
    mutate: Callable[[bytes, int, int, Mutate], bytes]
    seeds: Callable[[], list[bytes]]
    parser: frozenset[str]
    # Functions of those files that read what is already accepted.
    left_out: frozenset[str] = field(default_factory=frozenset)


def run_header(data: bytes, counts: Counts) -> None:
    """What we accept, the safetensors library accepts, and it sees the same tensors."""
    counts.inputs += 1
    if len(data) >= 8 and struct.unpack("<Q", data[:8])[0] <= min(MAX_HEADER_BYTES, len(data) - 8):
        counts.parsed += 1
    try:
        tensors = read_header(BytesIO(data), len(data))
    except InvalidArgument:
        return
    counts.accepted += 1
    library: Any = safetensors
    theirs = {name: tuple(info["shape"]) for name, info in library.deserialize(data)}
    assert {tensor.name: tensor.shape for tensor in tensors} == theirs


def mutate_header(data: bytes, max_bytes: int, seed: int, mutate: Mutate) -> bytes:
    choice = random.Random(seed)
    if len(data) < 8 or choice.random() > TRUE_LENGTH_SHARE:
        return mutate(data, max_bytes)
    length = min(struct.unpack("<Q", data[:8])[0], len(data) - 8)
    header, rest = data[8 : 8 + length], data[8 + length :]
    header = mutate(header, max(1, max_bytes - 8 - len(rest)))
    return (struct.pack("<Q", len(header)) + header + rest)[:max_bytes]


def run_config(data: bytes, counts: Counts) -> None:
    """What we accept is JSON to others too, and gives every module a rank and a finite scaling."""
    counts.inputs += 1
    counts.parsed += data.lstrip().startswith(b"{")
    try:
        config = parse_config(data)
    except InvalidArgument:
        return
    counts.accepted += 1
    assert isinstance(json.loads(data), dict)
    assert config.rank_of(KEY) >= 1
    assert math.isfinite(config.scaling_of(KEY))
    assert isinstance(config.takes_effect(KEY, 1), bool)
    again = parse_config(json.dumps(config.canonical() | {"rank_pattern": {}, "alpha_pattern": {}}).encode())
    assert (again.lora_rank, again.lora_alpha, again.use_rslora) == (
        config.lora_rank,
        config.lora_alpha,
        config.use_rslora,
    )


def mutate_config(data: bytes, max_bytes: int, seed: int, mutate: Mutate) -> bytes:
    return mutate(data, max_bytes)


TARGETS = {
    "header": Target(
        run_header,
        mutate_header,
        header_seeds,
        frozenset({"weights.py", "strict_json.py"}),
        frozenset({"read_tensor", "widen", "take", "__init__"}),
    ),
    "config": Target(run_config, mutate_config, config_seeds, frozenset({"peft_config.py", "patterns.py"})),
}
