"""Which tile a kernel runs with: a small checked-in table by operation, shape class and architecture.

The choice is pure. `make tune-gpu` writes `tiles.json` with the hardware it ran on; entries of architecture "any" are
defaults that nobody has measured. Those that `hardware` does not name are chosen so that nothing spills.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).with_name("tiles.json")
ANY = "any"
DECODE, PREFILL = "decode", "prefill"
# Up to here a step is taken for decodes: every program has few tokens, and reading adapters is the work.
DECODE_TOKENS = 256

Tile = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Table:
    """`hardware` says what was measured; `tiles[op, shape class, architecture]`."""

    hardware: str
    tiles: Mapping[tuple[str, str, str], Tile]

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> "Table":
        """Raises ValueError when an entry is there twice or a (op, class) has no default."""
        tiles: dict[tuple[str, str, str], Tile] = {}
        for entry in document["tiles"]:
            key = entry["op"], entry["class"], entry["architecture"]
            if key in tiles:
                raise ValueError(f"two tiles for {key}")
            tiles[key] = {name: int(value) for name, value in entry["tile"].items()}
        for op, shape_class, _ in tiles:
            if (op, shape_class, ANY) not in tiles:
                raise ValueError(f"no tile of architecture {ANY!r} for {op} {shape_class}")
        return cls(document["hardware"], tiles)

    def choose(self, op: str, shape_class: str, architecture: str) -> Tile:
        """The tile of the architecture, else the default. Raises KeyError for an unknown op or class."""
        return self.tiles.get((op, shape_class, architecture)) or self.tiles[op, shape_class, ANY]


@cache
def table() -> Table:
    return Table.of(json.loads(TABLE.read_text()))


_forced: dict[tuple[str, str], Tile] = {}
_forced_architecture = ""
_deterministic = False


@contextmanager
def force(op: str, shape_class: str, tile: Tile) -> Iterator[None]:
    """That tile for that class inside: for tuning and for tests."""
    _forced[op, shape_class] = tile
    try:
        yield
    finally:
        del _forced[op, shape_class]


@contextmanager
def architecture(name: str) -> Iterator[None]:
    """Choices inside are for that architecture ("sm_90"), whatever this machine has."""
    global _forced_architecture
    before, _forced_architecture = _forced_architecture, name
    try:
        yield
    finally:
        _forced_architecture = before


def set_deterministic(on: bool) -> None:
    """On: one tile for every batch, so that a token's bits do not depend on how many tokens run beside it."""
    global _deterministic
    _deterministic = on


def is_deterministic() -> bool:
    return _deterministic


def token_class(num_tokens: int) -> str:
    return DECODE if _deterministic or num_tokens <= DECODE_TOKENS else PREFILL


def choose(op: str, shape_class: str, device: torch.device) -> Tile:
    forced = _forced.get((op, shape_class))
    return forced or table().choose(op, shape_class, _forced_architecture or architecture_of(device))


@cache
def architecture_of(device: torch.device) -> str:
    """`sm_90`; "any" for a device that is no GPU."""
    if device.type != "cuda":
        return ANY
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
