"""Conversations to prompts: the checkpoint's chat template, rendered as transformers does, in jinja2's sandbox."""

import asyncio
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Environment, Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from common.errors import FailedPrecondition, InvalidArgument
from loraplex.v1 import types_pb2

TEMPLATE_FILE = "chat_template.jinja"
# The longest prompt that fits into a message, twice.
MAX_RENDERED_CHARACTERS = 8 * 1024 * 1024
MAX_RENDER_SECONDS = 2.0
MAX_COMPILED_TEMPLATES = 64
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

_TOO_LONG = f"it makes more than {MAX_RENDERED_CHARACTERS} characters"

# When the rendering of this thread must have ended, on the monotonic clock.
_render_until: ContextVar[float] = ContextVar("render_until")


class _TooMuch(TemplateError):
    """The template takes too long, or writes too much."""


@dataclass(frozen=True)
class ChatTemplates:
    """The template of a checkpoint and the names of its special tokens."""

    source: str | None
    special_tokens: Mapping[str, str]
    max_seconds: float = MAX_RENDER_SECONDS

    @classmethod
    def of_files(cls, files: Mapping[str, bytes]) -> "ChatTemplates":
        """`files` by name. Raises ValueError naming a file that cannot be read."""
        config = _read_json(files, "tokenizer_config.json")
        tokens = {**_read_json(files, "special_tokens_map.json"), **config}
        named = {name: _content(tokens[name]) for name in _SPECIAL_TOKENS if tokens.get(name)}
        if TEMPLATE_FILE in files:
            return cls(_decoded(files, TEMPLATE_FILE), named)
        return cls(_default_of(config.get("chat_template")), named)

    async def render(self, messages: Sequence[types_pb2.ChatMessage], source: str = "") -> str:
        """The prompt, with the start of the answer; by another template when `source` is given. Off the event loop.

        Raises InvalidArgument when the template refuses the conversation, FailedPrecondition when there is none.
        """
        chosen = source or self.source
        if not chosen:
            raise FailedPrecondition("NO_CHAT_TEMPLATE", "this model has no chat template: send text or token_ids")
        return await asyncio.to_thread(self._render, chosen, messages)

    def _render(self, source: str, messages: Sequence[types_pb2.ChatMessage]) -> str:
        _render_until.set(time.monotonic() + self.max_seconds)
        conversation = [{"role": message.role, "content": message.content} for message in messages]
        try:
            pieces = _compiled(source).generate(
                messages=conversation, tools=None, documents=None, add_generation_prompt=True, **self.special_tokens
            )
            return _joined(pieces)
        except TemplateError as error:
            raise _refused(str(error.message or type(error).__name__)) from None
        except Exception as error:  # whatever a template may do wrong
            raise _refused(f"it fails with {type(error).__name__}") from None


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with an end to how long a template runs and how much it writes."""

    intercepted_binops = frozenset(["*", "**", "+"])

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and not (abs(left) < 2**32 and abs(right) < 64):
            raise _TooMuch("a power in it is too large")
        if operator == "*":
            _check_length(max(_length(left) * _times(right), _times(left) * _length(right)))
        if operator == "+":
            _check_length(_length(left) + _length(right))
        return super().call_binop(context, operator, left, right)

    def concatenate(self, *parts: Any) -> str:
        """The operator `~`."""
        return _joined(map(str, parts))

    def look_at_clock(self) -> None:
        if time.monotonic() > _render_until.get():
            raise _TooMuch("it takes too long")

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template: nodes.Template = _Bounded().visit(super()._parse(source, name, filename))
        return template


class _Bounded(NodeTransformer):
    """Puts a look at the clock into every loop and macro, and a check of the length into every `~`."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._with_look(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._with_look(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("concatenate", node.nodes, node.lineno)

    def _with_look(self, node: nodes.For | nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("look_at_clock", [], node.lineno), lineno=node.lineno))
        return node


class _GenerationTag(Extension):
    """`{% generation %}` marks answers for training; here its body is text like any other."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Dict:
    """`dict` without the attributes of the type."""

    def __call__(self, *pairs: Any, **items: Any) -> dict[Any, Any]:
        return dict(*pairs, **items)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _Namespace(Namespace):
    """`namespace` without names that could reach into the interpreter."""

    def __init__(*arguments: Any, **attributes: Any) -> None:
        self, *pairs = arguments
        values = dict(*pairs, **attributes)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: str) -> None:
    if name.startswith("_"):
        raise SecurityError(f"the name {name!r} in a namespace begins with an underscore")


@lru_cache(maxsize=MAX_COMPILED_TEMPLATES)
def _compiled(source: str) -> Template:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise, strftime_now=_strftime_now, dict=_Dict(), namespace=_Namespace)
    return environment.from_string(source)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Without the HTML escapes of jinja2's own."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _call(name: str, arguments: list[nodes.Expr], line: int) -> nodes.Call:
    """A call of a method of the environment."""
    return nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None, lineno=line)


def _joined(pieces: Iterable[str]) -> str:
    kept, length = [], 0
    for piece in pieces:
        length += len(piece)
        _check_length(length)
        kept.append(piece)
    return "".join(kept)


def _check_length(length: int) -> None:
    if length > MAX_RENDERED_CHARACTERS:
        raise _TooMuch(_TOO_LONG)


def _length(value: Any) -> int:
    """Of a string or a list; 0 of anything else."""
    return len(value) if hasattr(value, "__len__") else 0


def _times(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _refused(problem: str) -> InvalidArgument:
    message = f"the chat template does not take this conversation: {problem}"
    return InvalidArgument("CHAT_TEMPLATE_FAILED", message, field="chat")


def _read_json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """Empty when there is no such file."""
    if name not in files:
        return {}
    try:
        value = json.loads(files[name])
    except ValueError as error:
        raise ValueError(f"{name} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name} does not hold a JSON object")
    return value


def _decoded(files: Mapping[str, bytes], name: str) -> str:
    try:
        return files[name].decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{name} is not valid UTF-8") from None


def _default_of(template: Any) -> str | None:
    """A template, or the one named `default` of a list of them."""
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _content(token: Any) -> str:
    """A special token is written as its text, or as an object that holds it."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token)
