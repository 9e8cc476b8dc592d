"""JSON that means one thing only: no duplicate keys, no NaN, no deep nesting, no surprises between two parsers."""

import json
import re
from typing import Any, NoReturn

from common.errors import InvalidArgument

# An unterminated string counts to the end of the text, so that one pass is enough whatever the input.
_STRING = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_BRACKET = re.compile(r"[\[\]{}]")


def parse_object(data: bytes, *, what: str, reason: str, max_bytes: int, max_depth: int) -> dict[str, Any]:
    """The JSON object in `data`. Raises InvalidArgument with `reason` and a sentence that begins with `what`."""

    def refuse(problem: str) -> NoReturn:
        raise InvalidArgument(reason, f"{what} {problem}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                refuse(f"has the key {key[:80]!r} twice")
            found[key] = value
        return found

    def integer(digits: str) -> int:
        # Other parsers read "-0" as a float.
        if digits == "-0" or len(digits) > 20:
            refuse("holds an integer of more than 64 bits or a negative zero")
        return int(digits)

    if len(data) > max_bytes:
        refuse(f"has {len(data)} bytes; the limit is {max_bytes}")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        refuse("is not valid UTF-8")
    if _depth(text) > max_depth:
        refuse(f"is nested deeper than {max_depth} levels")
    try:
        value = json.loads(
            text,
            object_pairs_hook=unique,
            parse_int=integer,
            parse_constant=lambda constant: refuse(f"holds {constant}, which is not JSON"),
        )
    except json.JSONDecodeError as error:
        refuse(f"is not valid JSON: {error}")
    if not isinstance(value, dict):
        refuse("is not a JSON object")
    if _has_lone_surrogate(value):
        refuse("holds half of a surrogate pair")
    return value


def _depth(text: str) -> int:
    depth = deepest = 0
    for bracket in _BRACKET.finditer(_STRING.sub("", text)):
        depth += 1 if bracket[0] in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _has_lone_surrogate(value: object) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False
