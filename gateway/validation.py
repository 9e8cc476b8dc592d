"""Every field of a GenerateRequest against its range: out of range is an error, nothing is clamped."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from common.errors import InvalidArgument
from gateway.prompts import PromptSpec
from loraplex.v1 import gateway_pb2, types_pb2

MAX_TEMPERATURE = 10.0
MAX_PENALTY = 2.0
MAX_REPETITION_PENALTY = 10.0
MAX_LOGIT_BIAS = 100.0
MAX_LOGIT_BIAS_ENTRIES = 1024
MAX_OUTPUTS = 16
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256
MAX_LOGPROBS = 20
MAX_CHAT_MESSAGES = 4096
MAX_ROLE_CHARACTERS = 64
DEFAULT_MAX_TOKENS = 128
MAX_PAGE_SIZE = 1000
DEFAULT_PAGE_SIZE = 100

_ADAPTER_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}(?<!\.)")
_VERSION = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What the base model allows, in tokens."""

    vocab_size: int
    max_context_tokens: int


@dataclass(frozen=True, slots=True)
class GenerateSpec:
    """A request whose every field is in range, defaults filled in."""

    adapter_id: str
    adapter_version: str
    prompt: PromptSpec
    # Without a seed when the client gave none.
    sampling: types_pb2.SamplingParams
    # Without max_tokens when the client gave none: see `fit_context`.
    stopping: types_pb2.StoppingParams
    output: types_pb2.OutputParams
    scheduling: types_pb2.SchedulingParams


def validate(request: gateway_pb2.GenerateRequest, limits: ModelLimits) -> GenerateSpec:
    """Raises InvalidArgument naming field, limit and value."""
    check_adapter(request.adapter_id, request.adapter_version)
    return GenerateSpec(
        adapter_id=request.adapter_id,
        adapter_version=request.adapter_version,
        prompt=prompt_of(request, limits),
        sampling=_sampling(request.sampling, limits),
        stopping=_stopping(request.stopping, limits),
        output=_output(request.output),
        scheduling=_scheduling(request.scheduling),
    )


def check_adapter(adapter_id: str, adapter_version: str = "") -> None:
    """Raises InvalidArgument when an id or a digest is not spelled like one."""
    if adapter_id and not _ADAPTER_ID.fullmatch(adapter_id):
        message = "adapter_id must match [a-z0-9][a-z0-9._-]{0,63} and not end with a dot"
        raise _invalid("adapter_id", f"{message}; it is {_shown(adapter_id)}")
    if adapter_version and not _VERSION.fullmatch(adapter_version):
        message = f"adapter_version must be 64 lower-case hex digits; it is {_shown(adapter_version)}"
        raise _invalid("adapter_version", message)
    if adapter_version and not adapter_id:
        raise _invalid("adapter_version", "adapter_version is set but adapter_id is empty: the base model has none")


def check_token_ids(ids: Iterable[int], limits: ModelLimits, field: str) -> None:
    """Raises InvalidArgument for the first id outside of the vocabulary."""
    for position, token_id in enumerate(ids):
        if token_id >= limits.vocab_size:
            message = f"{field}[{position}] must be below the vocabulary size {limits.vocab_size}; it is {token_id}"
            raise _invalid(field, message)


def fit_context(stopping: types_pb2.StoppingParams, prompt_tokens: int, limits: ModelLimits) -> None:
    """Checks that prompt and output fit into the context; a missing max_tokens becomes 128, or what is left if less.

    Raises InvalidArgument CONTEXT_LENGTH_EXCEEDED naming prompt, max_tokens and limit, or when no prompt is left.
    """
    if prompt_tokens == 0:
        raise _invalid("prompt", "the prompt is empty: at least 1 token is needed", reason="EMPTY_PROMPT")
    left = limits.max_context_tokens - prompt_tokens
    wanted = stopping.max_tokens if stopping.HasField("max_tokens") else max(1, min(DEFAULT_MAX_TOKENS, left))
    if wanted > left:
        raise InvalidArgument(
            "CONTEXT_LENGTH_EXCEEDED",
            f"prompt and max_tokens must be at most {limits.max_context_tokens} tokens together; "
            f"they are {prompt_tokens} + {wanted}",
            metadata={
                "prompt_tokens": str(prompt_tokens),
                "max_tokens": str(wanted),
                "max_context_tokens": str(limits.max_context_tokens),
            },
            field="stopping.max_tokens",
        )
    if stopping.min_tokens > wanted:
        limit = f"stopping.min_tokens must be at most max_tokens, {wanted}"
        raise _invalid("stopping.min_tokens", f"{limit}; it is {stopping.min_tokens}")
    stopping.max_tokens = wanted


def page_size_of(page_size: int) -> int:
    """0 means 100. Raises InvalidArgument above 1,000."""
    _check_integer("page_size", page_size, 0, MAX_PAGE_SIZE)
    return page_size or DEFAULT_PAGE_SIZE


def prompt_of(request: gateway_pb2.GenerateRequest | gateway_pb2.TokenizeRequest, limits: ModelLimits) -> PromptSpec:
    """Raises InvalidArgument when there is none, or one that cannot be tokenised."""
    if request.HasField("text"):
        if not request.text:
            raise _invalid("text", "the prompt is empty: at least 1 character is needed", reason="EMPTY_PROMPT")
        _check_no_nul("text", request.text)
        return PromptSpec(text=request.text)
    if request.HasField("chat"):
        return PromptSpec(chat=_messages(request.chat))
    if isinstance(request, gateway_pb2.GenerateRequest) and request.HasField("token_ids"):
        ids = request.token_ids.ids
        # Before every id is looked at: the context bounds that work.
        if len(ids) <= limits.max_context_tokens:
            check_token_ids(ids, limits, "token_ids.ids")
        return PromptSpec(token_ids=tuple(ids))
    raise _invalid("prompt", "no prompt is given: set one of its fields", reason="EMPTY_PROMPT")


def _messages(chat: types_pb2.ChatPrompt) -> tuple[types_pb2.ChatMessage, ...]:
    if not chat.messages:
        raise _invalid("chat", "the prompt is empty: at least 1 message is needed", reason="EMPTY_PROMPT")
    _check_count("chat.messages", len(chat.messages), MAX_CHAT_MESSAGES, "messages")
    for position, message in enumerate(chat.messages):
        field = f"chat.messages[{position}]"
        _check_integer(f"{field}.role", len(message.role), 1, MAX_ROLE_CHARACTERS, unit="characters")
        _check_no_nul(f"{field}.role", message.role)
        _check_no_nul(f"{field}.content", message.content)
    return tuple(chat.messages)


def _sampling(given: types_pb2.SamplingParams, limits: ModelLimits) -> types_pb2.SamplingParams:
    sampling = types_pb2.SamplingParams()
    sampling.CopyFrom(given)
    for name in ("temperature", "top_p", "repetition_penalty"):
        if not given.HasField(name):
            setattr(sampling, name, 1.0)
    _check_number("sampling.temperature", sampling.temperature, 0.0, MAX_TEMPERATURE)
    _check_number("sampling.top_p", sampling.top_p, 0.0, 1.0, above_low=True)
    _check_integer("sampling.top_k", sampling.top_k, 0, limits.vocab_size)
    _check_number("sampling.min_p", sampling.min_p, 0.0, 1.0)
    _check_number("sampling.presence_penalty", sampling.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
    _check_number("sampling.frequency_penalty", sampling.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)
    penalty = sampling.repetition_penalty
    _check_number("sampling.repetition_penalty", penalty, 0.0, MAX_REPETITION_PENALTY, above_low=True)
    _check_count("sampling.logit_bias", len(sampling.logit_bias), MAX_LOGIT_BIAS_ENTRIES, "entries")
    for token_id, bias in sampling.logit_bias.items():
        _check_integer("sampling.logit_bias", token_id, 0, limits.vocab_size - 1)
        _check_number("sampling.logit_bias", bias, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)
    return sampling


def _stopping(given: types_pb2.StoppingParams, limits: ModelLimits) -> types_pb2.StoppingParams:
    if given.HasField("max_tokens"):
        _check_integer("stopping.max_tokens", given.max_tokens, 1, limits.max_context_tokens)
    _check_integer("stopping.min_tokens", given.min_tokens, 0, limits.max_context_tokens)
    _check_count("stopping.stop", len(given.stop), MAX_STOP_STRINGS, "strings")
    for stop in given.stop:
        _check_integer("stopping.stop", len(stop), 1, MAX_STOP_CHARACTERS, unit="characters")
        _check_no_nul("stopping.stop", stop)
    check_token_ids(given.stop_token_ids, limits, "stopping.stop_token_ids")
    stopping = types_pb2.StoppingParams()
    stopping.CopyFrom(given)
    return stopping


def _output(given: types_pb2.OutputParams) -> types_pb2.OutputParams:
    output = types_pb2.OutputParams()
    output.CopyFrom(given)
    if not given.HasField("n"):
        output.n = 1
    _check_integer("output.n", output.n, 1, MAX_OUTPUTS)
    _check_integer("output.logprobs", given.logprobs, 0, MAX_LOGPROBS)
    _check_integer("output.prompt_logprobs", given.prompt_logprobs, 0, MAX_LOGPROBS)
    return output


def _scheduling(given: types_pb2.SchedulingParams) -> types_pb2.SchedulingParams:
    if given.HasField("ttft_slo_seconds"):
        _check_number("scheduling.ttft_slo_seconds", given.ttft_slo_seconds, 0.0, math.inf, above_low=True)
    scheduling = types_pb2.SchedulingParams()
    scheduling.CopyFrom(given)
    return scheduling


def _check_number(field: str, value: float, low: float, high: float, *, above_low: bool = False) -> None:
    if math.isfinite(value) and (low < value if above_low else low <= value) and value <= high:
        return
    bounds = f"{'above' if above_low else 'at least'} {low:g}" + (f" and at most {high:g}" if high < math.inf else "")
    raise _invalid(field, f"{field} must be a finite number {bounds}; it is {value:g}")


def _check_integer(field: str, value: int, low: int, high: int, *, unit: str = "") -> None:
    if not low <= value <= high:
        range_text = f"{low} to {high} {unit}".rstrip()
        raise _invalid(field, f"{field} must be {range_text}; it is {value}")


def _check_count(field: str, count: int, limit: int, unit: str) -> None:
    if count > limit:
        raise _invalid(field, f"{field} must have at most {limit} {unit}; it has {count}")


def _check_no_nul(field: str, text: str) -> None:
    if (position := text.find("\0")) >= 0:
        raise _invalid(field, f"{field} must have no NUL character; it has one at position {position}")


def _shown(text: str) -> str:
    """A client's string for a message: escaped, and cut where nobody reads on."""
    return repr(text if len(text) <= 80 else text[:80] + "…")


def _invalid(field: str, message: str, *, reason: str = "INVALID_FIELD") -> InvalidArgument:
    return InvalidArgument(reason, message, field=field)
