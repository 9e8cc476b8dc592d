"""rank_pattern and alpha_pattern, matched as PEFT matches them, without running a user's regular expression.

PEFT tests `(.*\\.)?(KEY)$` for each key in the order of the file; the first match wins. Every plain key is a regular
expression too, one in which a dot stands for any character; only these, and a leading `^`, are accepted.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from common.errors import InvalidArgument

MAX_PATTERNS = 4096

_PLAIN = re.compile(r"\^?[A-Za-z0-9_.]{1,200}")


@dataclass(frozen=True, slots=True)
class Patterns:
    """(key, value) in the order of the file."""

    items: tuple[tuple[str, float], ...]

    def value_of(self, key: str, default: float) -> float:
        """The value of the first pattern that matches the module `key`."""
        return next((value for pattern, value in self.items if _matches(pattern, key)), default)


def parse_patterns(raw: object, name: str, parse_value: Callable[[object, str], float]) -> Patterns:
    """Raises InvalidArgument for a key that is more than a module name; `parse_value` raises for a bad value."""
    if raw is None:
        return Patterns(())
    if not isinstance(raw, dict) or len(raw) > MAX_PATTERNS:
        raise InvalidArgument(
            "CONFIG_INVALID", f"adapter_config.json: {name} must be an object of <= {MAX_PATTERNS} keys"
        )
    for key in raw:
        if not _PLAIN.fullmatch(key):
            message = (
                f"adapter_config.json: the key {key[:80]!r} of {name} is a regular expression; "
                "only module names, or their ends, are supported"
            )
            raise InvalidArgument("PATTERN_UNSUPPORTED", message)
    return Patterns(tuple((key, parse_value(value, f"{name}[{key[:80]!r}]")) for key, value in raw.items()))


def is_targeted(key: str, targets: Iterable[str]) -> bool:
    """Whether a list of target modules names the module `key`: the whole name or its end after a dot."""
    return any(key == target or key.endswith(f".{target}") for target in targets)


def _matches(pattern: str, key: str) -> bool:
    if pattern.startswith("^"):
        return _same(pattern[1:], key)
    start = len(key) - len(pattern)
    return start >= 0 and (start == 0 or key[start - 1] == ".") and _same(pattern, key[start:])


def _same(pattern: str, text: str) -> bool:
    return len(pattern) == len(text) and all(p in (".", t) for p, t in zip(pattern, text, strict=True))
