"""Every field of a GenerateRequest: what is refused, in which words, and what is filled in."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from common.errors import InvalidArgument, LoraplexError
from gateway.prompts import PromptSpec
from gateway.validation import ModelLimits, check_adapter, check_token_ids, fit_context, page_size_of, validate
from loraplex.v1 import gateway_pb2, types_pb2

LIMITS = ModelLimits(vocab_size=100, max_context_tokens=64)
VERSION = "0" * 64
NOT_FINITE = (math.nan, math.inf, -math.inf)

OUT_OF_RANGE: dict[str, tuple[Any, ...]] = {
    "sampling.temperature": (-0.01, 10.1, *NOT_FINITE),
    "sampling.top_p": (0.0, -0.01, 1.01, *NOT_FINITE),
    "sampling.top_k": (101,),
    "sampling.min_p": (-0.01, 1.01, *NOT_FINITE),
    "sampling.presence_penalty": (-2.01, 2.01, *NOT_FINITE),
    "sampling.frequency_penalty": (-2.01, 2.01, *NOT_FINITE),
    "sampling.repetition_penalty": (0.0, -0.01, 10.1, *NOT_FINITE),
    "stopping.max_tokens": (0, 65),
    "stopping.min_tokens": (65,),
    "output.n": (0, 17),
    "output.logprobs": (21,),
    "output.prompt_logprobs": (21,),
    "scheduling.ttft_slo_seconds": (0.0, -1.0, *NOT_FINITE),
}
IN_RANGE: dict[str, tuple[Any, ...]] = {
    "sampling.temperature": (0.0, 10.0),
    "sampling.top_p": (0.001, 1.0),
    "sampling.top_k": (0, 100),
    "sampling.min_p": (0.0, 1.0),
    "sampling.presence_penalty": (-2.0, 2.0),
    "sampling.frequency_penalty": (-2.0, 2.0),
    "sampling.repetition_penalty": (0.001, 10.0),
    "sampling.seed": (0, 2**64 - 1),
    "stopping.max_tokens": (1, 64),
    "stopping.min_tokens": (0, 64),
    "stopping.ignore_eos": (True,),
    "stopping.include_stop": (True,),
    "output.n": (1, 16),
    "output.logprobs": (0, 20),
    "output.prompt_logprobs": (0, 20),
    "output.return_token_ids": (True,),
    "output.echo": (True,),
    "scheduling.priority": (-(2**31), 2**31 - 1),
    "scheduling.ttft_slo_seconds": (0.001, 1e6),
}
# Checked by tests of their own below.
REPEATED = {"sampling.logit_bias", "stopping.stop", "stopping.stop_token_ids"}


def request_with(field: str = "", value: Any = None) -> gateway_pb2.GenerateRequest:
    request = gateway_pb2.GenerateRequest(text="hi")
    if field:
        part, name = field.split(".")
        setattr(getattr(request, part), name, value)
    return request


def refusal(request: gateway_pb2.GenerateRequest) -> LoraplexError:
    with pytest.raises(LoraplexError) as caught:
        validate(request, LIMITS)
    return caught.value


def cases(table: dict[str, tuple[Any, ...]]) -> list[Any]:
    return [pytest.param(field, value, id=f"{field}={value}") for field, values in table.items() for value in values]


@pytest.mark.parametrize(("field", "value"), cases(OUT_OF_RANGE))
def test_a_value_out_of_range_is_refused(field: str, value: Any) -> None:
    error = refusal(request_with(field, value))
    assert isinstance(error, InvalidArgument)
    assert error.field == field
    assert error.message.startswith(field)
    assert error.message.endswith(f"it is {value:g}" if isinstance(value, float) else f"it is {value}")


@pytest.mark.parametrize(("field", "value"), cases(IN_RANGE))
def test_a_value_in_range_passes_unchanged(field: str, value: Any) -> None:
    spec = validate(request_with(field, value), LIMITS)
    part, name = field.split(".")
    assert getattr(getattr(spec, part), name) == pytest.approx(value)


def test_every_field_of_the_parameters_is_in_these_tables() -> None:
    parts: dict[str, Any] = {
        "sampling": types_pb2.SamplingParams,
        "stopping": types_pb2.StoppingParams,
        "output": types_pb2.OutputParams,
        "scheduling": types_pb2.SchedulingParams,
    }
    fields = {f"{part}.{field.name}" for part, message in parts.items() for field in message.DESCRIPTOR.fields}
    assert fields == OUT_OF_RANGE.keys() | IN_RANGE.keys() | REPEATED


@pytest.mark.parametrize("bias", [100.1, -100.1, *NOT_FINITE])
def test_a_bias_out_of_range_is_refused(bias: float) -> None:
    request = request_with()
    request.sampling.logit_bias[0] = bias
    assert "sampling.logit_bias must be a finite number" in refusal(request).message


def test_a_bias_of_an_unknown_token_is_refused() -> None:
    request = request_with()
    request.sampling.logit_bias[100] = 0.0
    assert refusal(request).message == "sampling.logit_bias must be 0 to 99; it is 100"


def test_too_many_biases_are_refused() -> None:
    request = request_with()
    for token_id in range(1025):
        request.sampling.logit_bias[token_id] = 0.0
    assert refusal(request).message == "sampling.logit_bias must have at most 1024 entries; it has 1025"


def test_a_bias_in_range_passes() -> None:
    request = request_with()
    request.sampling.logit_bias[99] = -100.0
    assert dict(validate(request, LIMITS).sampling.logit_bias) == {99: -100.0}


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        pytest.param(["x"] * 17, "stopping.stop must have at most 16 strings; it has 17", id="17 strings"),
        pytest.param(["x" * 257], "stopping.stop must be 1 to 256 characters; it is 257", id="257 characters"),
        pytest.param([""], "stopping.stop must be 1 to 256 characters; it is 0", id="empty"),
        pytest.param(["a\0"], "stopping.stop must have no NUL character; it has one at position 1", id="NUL"),
    ],
)
def test_a_stop_string_out_of_range_is_refused(stop: list[str], message: str) -> None:
    request = request_with()
    request.stopping.stop.extend(stop)
    assert refusal(request).message == message


def test_stop_strings_in_range_pass() -> None:
    request = request_with()
    request.stopping.stop.extend(["é" * 256] * 16)
    assert len(validate(request, LIMITS).stopping.stop) == 16


def test_a_stop_token_out_of_the_vocabulary_is_refused() -> None:
    request = request_with()
    request.stopping.stop_token_ids.extend([99, 100])
    expected = "stopping.stop_token_ids[1] must be below the vocabulary size 100; it is 100"
    assert refusal(request).message == expected


@pytest.mark.parametrize("adapter_id", ["A", "-a", "a.", "a/b", "a b", "a\0b", "ä", "../x", "a" * 65, "a\n"])
def test_an_id_that_is_not_spelled_like_one_is_refused(adapter_id: str) -> None:
    with pytest.raises(InvalidArgument, match="adapter_id must match"):
        check_adapter(adapter_id)


@pytest.mark.parametrize("adapter_id", ["", "a", "0", "a" * 64, "sql-v1.2_x"])
def test_an_id_that_is_spelled_like_one_passes(adapter_id: str) -> None:
    check_adapter(adapter_id)


@pytest.mark.parametrize("version", ["0" * 63, "0" * 65, "G" * 64, "A" * 64])
def test_a_version_that_is_no_digest_is_refused(version: str) -> None:
    with pytest.raises(InvalidArgument, match="64 lower-case hex digits"):
        check_adapter("a", version)


def test_a_version_of_the_base_model_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="the base model has none"):
        check_adapter("", VERSION)


@pytest.mark.parametrize(
    "request_of",
    [
        pytest.param(lambda: gateway_pb2.GenerateRequest(), id="none"),
        pytest.param(lambda: gateway_pb2.GenerateRequest(text=""), id="empty text"),
        pytest.param(lambda: gateway_pb2.GenerateRequest(chat=types_pb2.ChatPrompt()), id="empty conversation"),
    ],
)
def test_an_empty_prompt_is_refused(request_of: Callable[[], gateway_pb2.GenerateRequest]) -> None:
    assert refusal(request_of()).reason == "EMPTY_PROMPT"


def test_a_prompt_of_no_tokens_is_refused() -> None:
    with pytest.raises(InvalidArgument) as caught:
        fit_context(types_pb2.StoppingParams(), 0, LIMITS)
    assert caught.value.reason == "EMPTY_PROMPT"


def test_a_prompt_token_out_of_the_vocabulary_is_refused() -> None:
    request = gateway_pb2.GenerateRequest(token_ids=types_pb2.TokenIds(ids=[0, 100]))
    assert refusal(request).message == "token_ids.ids[1] must be below the vocabulary size 100; it is 100"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        pytest.param([("", "x")], "chat.messages[0].role must be 1 to 64 characters; it is 0", id="no role"),
        pytest.param([("r" * 65, "x")], "chat.messages[0].role must be 1 to 64 characters; it is 65", id="long role"),
        pytest.param(
            [("user", "x"), ("user", "a\0")],
            "chat.messages[1].content must have no NUL character; it has one at position 1",
            id="NUL",
        ),
        pytest.param([("user", "")] * 4097, "chat.messages must have at most 4096 messages; it has 4097", id="4097"),
    ],
)
def test_a_conversation_out_of_range_is_refused(messages: list[tuple[str, str]], message: str) -> None:
    chat = types_pb2.ChatPrompt(messages=[types_pb2.ChatMessage(role=role, content=text) for role, text in messages])
    assert refusal(gateway_pb2.GenerateRequest(chat=chat)).message == message


def test_a_prompt_with_a_nul_is_refused() -> None:
    expected = "text must have no NUL character; it has one at position 2"
    assert refusal(gateway_pb2.GenerateRequest(text="ab\0")).message == expected


def test_a_conversation_passes() -> None:
    messages = [types_pb2.ChatMessage(role="user", content="")]
    request = gateway_pb2.GenerateRequest(chat=types_pb2.ChatPrompt(messages=messages))
    assert validate(request, LIMITS).prompt == PromptSpec(chat=tuple(messages))


def test_defaults_are_filled_in() -> None:
    spec = validate(request_with(), LIMITS)
    assert spec.sampling == types_pb2.SamplingParams(temperature=1.0, top_p=1.0, repetition_penalty=1.0)
    assert spec.output == types_pb2.OutputParams(n=1)
    assert spec.prompt == PromptSpec(text="hi")


@pytest.mark.parametrize(("prompt", "max_tokens"), [(60, 5), (64, 1), (1000, 64)])
def test_prompt_and_output_that_exceed_the_context_are_refused(prompt: int, max_tokens: int) -> None:
    with pytest.raises(InvalidArgument) as caught:
        fit_context(types_pb2.StoppingParams(max_tokens=max_tokens), prompt, LIMITS)
    assert caught.value.reason == "CONTEXT_LENGTH_EXCEEDED"
    expected = f"prompt and max_tokens must be at most 64 tokens together; they are {prompt} + {max_tokens}"
    assert caught.value.message == expected


def test_a_prompt_that_fills_the_context_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"they are 64 \+ 1"):
        fit_context(types_pb2.StoppingParams(), 64, LIMITS)


@pytest.mark.parametrize(("context", "expected"), [(1000, 128), (64, 54)])
def test_max_tokens_by_default_is_128_or_what_is_left(context: int, expected: int) -> None:
    stopping = types_pb2.StoppingParams()
    fit_context(stopping, 10, ModelLimits(100, context))
    assert stopping.max_tokens == expected


def test_min_tokens_above_max_tokens_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="must be at most max_tokens, 5; it is 6"):
        fit_context(types_pb2.StoppingParams(max_tokens=5, min_tokens=6), 1, LIMITS)


def test_all_ids_of_the_vocabulary_pass() -> None:
    check_token_ids(range(100), LIMITS, "text")


@pytest.mark.parametrize(("asked", "size"), [(0, 100), (1, 1), (1000, 1000)])
def test_page_sizes(asked: int, size: int) -> None:
    assert page_size_of(asked) == size


def test_a_page_size_above_the_limit_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="page_size must be 0 to 1000; it is 1001"):
        page_size_of(1001)


def test_a_refused_string_is_cut_in_the_message() -> None:
    with pytest.raises(InvalidArgument) as caught:
        check_adapter("A" * 100_000)
    assert len(caught.value.message) < 300
