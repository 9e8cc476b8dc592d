"""Every bad value of every field, at the gateway of a real fleet: what it says, and that the next request is served."""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from loraplex import Client
from loraplex.errors import FailedPrecondition
from loraplex.fleet import Fleet
from loraplex.v1 import gateway_pb2, gateway_pb2_grpc, types_pb2
from tests.checkout import read
from tests.e2e.tiny_model import VOCAB_SIZE, AdapterRecipe, TinyModel, save_adapter, save_base

CONTEXT = 512
NOT_FINITE = (math.nan, math.inf, -math.inf)
EXCEPTION_TEXT = re.compile(r"Traceback|Error\b|Exception|\.py\b| object at 0x")

# Field -> values that are refused, and the limits that the sentence must name.
RANGES: dict[str, tuple[Sequence[float], tuple[str, ...]]] = {
    "sampling.temperature": ((-0.01, 10.1, *NOT_FINITE), ("0", "10")),
    "sampling.top_p": ((0.0, -0.01, 1.01, *NOT_FINITE), ("0", "1")),
    "sampling.top_k": ((VOCAB_SIZE + 1, 2**32 - 1), ("0", str(VOCAB_SIZE))),
    "sampling.min_p": ((-0.01, 1.01, *NOT_FINITE), ("0", "1")),
    "sampling.presence_penalty": ((-2.01, 2.01, *NOT_FINITE), ("-2", "2")),
    "sampling.frequency_penalty": ((-2.01, 2.01, *NOT_FINITE), ("-2", "2")),
    "sampling.repetition_penalty": ((0.0, -0.01, 10.1, *NOT_FINITE), ("0", "10")),
    "stopping.max_tokens": ((0, CONTEXT + 1, 2**32 - 1), ("1", str(CONTEXT))),
    "stopping.min_tokens": ((CONTEXT + 1, 2**32 - 1), ("0", str(CONTEXT))),
    "output.n": ((0, 17, 2**32 - 1), ("1", "16")),
    "output.logprobs": ((21, 2**32 - 1), ("0", "20")),
    "output.prompt_logprobs": ((21, 2**32 - 1), ("0", "20")),
    "scheduling.ttft_slo_seconds": ((0.0, -1.0, *NOT_FINITE), ("0",)),
}
# Every value that fits the wire is right.
UNBOUNDED = {
    "sampling.seed",
    "stopping.ignore_eos",
    "stopping.include_stop",
    "output.return_token_ids",
    "output.echo",
    "scheduling.priority",
}
OF_THEIR_OWN = {"sampling.logit_bias", "stopping.stop", "stopping.stop_token_ids"}


@dataclass(frozen=True)
class Bad:
    """A request that is refused, and what the sentence must hold."""

    request: gateway_pb2.GenerateRequest
    names: tuple[str, ...]
    reason: str = "INVALID_FIELD"
    code: grpc.StatusCode = grpc.StatusCode.INVALID_ARGUMENT


def asking(**fields: Any) -> gateway_pb2.GenerateRequest:
    return gateway_pb2.GenerateRequest(**({"text": "hi"} | fields))


def with_field(field: str, value: float) -> gateway_pb2.GenerateRequest:
    request = asking()
    part, name = field.split(".")
    setattr(getattr(request, part), name, value)
    return request


def shown(value: float) -> str:
    return f"it is {value:g}" if isinstance(value, float) else f"it is {value}"


def out_of_range() -> dict[str, Bad]:
    return {
        f"{field}={value}": Bad(with_field(field, value), (field, *limits, shown(value)))
        for field, (values, limits) in RANGES.items()
        for value in values
    }


def lists() -> dict[str, Bad]:
    bias, stopping = "sampling.logit_bias", types_pb2.StoppingParams

    def biased(biases: dict[int, float]) -> gateway_pb2.GenerateRequest:
        return asking(sampling=types_pb2.SamplingParams(logit_bias=biases))

    return {
        **{f"bias={value}": Bad(biased({5: value}), (bias, "-100", "100", shown(value))) for value in (-100.5, 100.5)},
        **{f"bias={value}": Bad(biased({5: value}), (bias, "-100", "100", shown(value))) for value in NOT_FINITE},
        "bias of no token": Bad(biased({VOCAB_SIZE: 1.0}), (bias, str(VOCAB_SIZE - 1), f"it is {VOCAB_SIZE}")),
        "1025 biases": Bad(biased(dict.fromkeys(range(1025), 0.0)), (bias, "1024", "1025")),
        "17 stop strings": Bad(asking(stopping=stopping(stop=["x"] * 17)), ("stopping.stop", "16", "17")),
        "long stop string": Bad(asking(stopping=stopping(stop=["x" * 257])), ("stopping.stop", "256", "257")),
        "empty stop string": Bad(asking(stopping=stopping(stop=[""])), ("stopping.stop", "1", "it is 0")),
        "NUL in a stop string": Bad(asking(stopping=stopping(stop=["a\0"])), ("stopping.stop", "NUL", "position 1")),
        "stop token of no vocabulary": Bad(
            asking(stopping=stopping(stop_token_ids=[1, VOCAB_SIZE])),
            ("stopping.stop_token_ids[1]", str(VOCAB_SIZE), f"it is {VOCAB_SIZE}"),
        ),
        "min_tokens above max_tokens": Bad(
            asking(stopping=stopping(max_tokens=5, min_tokens=6)), ("stopping.min_tokens", "5", "it is 6")
        ),
    }


def prompts() -> dict[str, Bad]:
    def ids(*token_ids: int) -> gateway_pb2.GenerateRequest:
        return gateway_pb2.GenerateRequest(token_ids=types_pb2.TokenIds(ids=token_ids))

    def chat(*turns: tuple[str, str]) -> gateway_pb2.GenerateRequest:
        messages = [types_pb2.ChatMessage(role=role, content=content) for role, content in turns]
        return gateway_pb2.GenerateRequest(chat=types_pb2.ChatPrompt(messages=messages))

    too_long = "CONTEXT_LENGTH_EXCEEDED"
    one_too_many = gateway_pb2.GenerateRequest(
        token_ids=types_pb2.TokenIds(ids=[5] * 500), stopping=types_pb2.StoppingParams(max_tokens=13)
    )
    return {
        "no prompt": Bad(gateway_pb2.GenerateRequest(), ("no prompt",), "EMPTY_PROMPT"),
        "empty text": Bad(asking(text=""), ("at least 1 character",), "EMPTY_PROMPT"),
        "empty ids": Bad(ids(), ("at least 1 token",), "EMPTY_PROMPT"),
        "empty chat": Bad(chat(), ("at least 1 message",), "EMPTY_PROMPT"),
        "text beyond the context": Bad(asking(text="x" * 600), (str(CONTEXT), "600 + "), too_long),
        "ids beyond the context": Bad(ids(*[5] * 513), (str(CONTEXT), "513 + "), too_long),
        "output beyond the context": Bad(one_too_many, (str(CONTEXT), "500 + 13"), too_long),
        "id of no vocabulary": Bad(ids(5, VOCAB_SIZE), ("token_ids.ids[1]", str(VOCAB_SIZE), f"it is {VOCAB_SIZE}")),
        "largest id": Bad(ids(2**32 - 1), ("token_ids.ids[0]", str(VOCAB_SIZE), f"it is {2**32 - 1}")),
        "NUL in the text": Bad(asking(text="ab\0"), ("text", "NUL", "position 2")),
        "NUL in a chat": Bad(chat(("user", "a\0")), ("chat.messages[0].content", "NUL", "position 1")),
        "no role": Bad(chat(("", "a")), ("chat.messages[0].role", "1 to 64", "it is 0")),
        "long role": Bad(chat(("r" * 65, "a")), ("chat.messages[0].role", "1 to 64", "it is 65")),
        "chat without a template": Bad(
            chat(("user", "a")), ("no chat template",), "NO_CHAT_TEMPLATE", grpc.StatusCode.FAILED_PRECONDITION
        ),
        "5 MB": Bad(asking(text="x" * 5_000_000), ("5000", "4194304"), "", grpc.StatusCode.RESOURCE_EXHAUSTED),
    }


def adapters() -> dict[str, Bad]:
    missing, not_found = "ADAPTER_NOT_FOUND", grpc.StatusCode.NOT_FOUND
    return {
        "unknown adapter": Bad(asking(adapter_id="ghost"), ("ghost",), missing, not_found),
        "unknown version": Bad(asking(adapter_id="rank-1", adapter_version="0" * 64), ("rank-1",), missing, not_found),
        "NUL in an id": Bad(asking(adapter_id="rank-1\0"), ("adapter_id", "must match", "rank-1\\x00")),
        "long id": Bad(asking(adapter_id="a" * 65), ("adapter_id", "{0,63}", "aaaa")),
        "version of no digest": Bad(asking(adapter_id="rank-1", adapter_version="1.0"), ("64", "'1.0'")),
        "version of the base": Bad(asking(adapter_version="0" * 64), ("adapter_version", "adapter_id is empty")),
    }


CASES = {**out_of_range(), **lists(), **prompts(), **adapters()}


@pytest.fixture(scope="module")
def channel(fleet: Fleet) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(fleet.gateway.address) as channel:
        yield channel


def refusal(call: Any) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    return caught.value


def reason_of(error: Any) -> str:
    details = dict(error.trailing_metadata()).get("grpc-status-details-bin", b"")
    info = error_details_pb2.ErrorInfo()
    return info.reason if any(d.Unpack(info) for d in status_pb2.Status.FromString(details).details) else ""


def assert_served(fleet: Fleet, tiny: TinyModel) -> None:
    with Client(fleet.gateway.address) as client:
        options: Any = {"temperature": 0.0, "max_tokens": 2, "ignore_eos": True, "return_token_ids": True}
        answer = client.generate(tiny.prompts["rank-1"], "rank-1", **options)
    assert list(answer.token_ids) == tiny.answers["rank-1"][:2]


def test_the_cases_hold_every_field_of_the_parameters() -> None:
    parts: dict[str, Any] = {
        "sampling": types_pb2.SamplingParams,
        "stopping": types_pb2.StoppingParams,
        "output": types_pb2.OutputParams,
        "scheduling": types_pb2.SchedulingParams,
    }
    fields = {f"{part}.{field.name}" for part, message in parts.items() for field in message.DESCRIPTOR.fields}
    assert fields == RANGES.keys() | UNBOUNDED | OF_THEIR_OWN


@pytest.mark.parametrize("bad", CASES.values(), ids=CASES)
def test_a_bad_request_is_refused_in_a_sentence_and_the_next_is_served(
    bad: Bad, fleet: Fleet, channel: grpc.Channel, tiny: TinyModel
) -> None:
    error: Any = refusal(gateway_pb2_grpc.GatewayServiceStub(channel).GenerateStream(bad.request))
    assert (error.code(), reason_of(error)) == (bad.code, bad.reason)
    assert all(name in error.details() for name in bad.names), error.details()
    assert not EXCEPTION_TEXT.search(error.details())
    assert not bad.reason or f"| `{bad.reason}` | `{bad.code.name}` |" in read("docs/api.md")
    assert_served(fleet, tiny)


@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"\x1a\x02\xc3\x28"], ids=["malformed", "invalid UTF-8"])
def test_bytes_that_are_no_request_are_refused_and_the_next_is_served(
    data: bytes, fleet: Fleet, channel: grpc.Channel, tiny: TinyModel
) -> None:
    call: Any = channel.unary_stream("/loraplex.v1.GatewayService/GenerateStream")
    error: Any = refusal(call(data))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_REQUEST")
    assert not EXCEPTION_TEXT.search(error.details())
    assert_served(fleet, tiny)


def test_the_invalid_utf8_is_that_of_the_text() -> None:
    """The same bytes with a valid character are a request."""
    assert gateway_pb2.GenerateRequest.FromString("\x1a\x02é".encode()).text == "é"


def test_an_adapter_of_other_shapes_is_refused_and_the_others_are_served(
    fleet: Fleet, tiny: TinyModel, tmp_path: Path
) -> None:
    save_base(tmp_path / "wider", hidden_size=80)
    save_adapter(tmp_path / "wider", tmp_path / "adapter", AdapterRecipe(4, 8, ("q_proj",)), seed=1)
    config = json.loads((tiny.base / "config.json").read_text())
    with Client(fleet.gateway.address) as client, pytest.raises(FailedPrecondition) as caught:
        client.adapters.push("wider", tmp_path / "adapter")
    assert caught.value.reason == "BASE_MODEL_MISMATCH"
    assert "80" in caught.value.message
    assert str(config["hidden_size"]) in caught.value.message
    assert not EXCEPTION_TEXT.search(caught.value.message)
    assert_served(fleet, tiny)
