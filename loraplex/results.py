"""What the clients return: frozen dataclasses, made from protobuf in one place."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from loraplex.v1 import adapter_store_pb2, gateway_pb2, types_pb2


class FinishReason(StrEnum):
    """Why an output ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORTED = "aborted"
    ERROR = "error"


_FINISH_REASONS = {
    types_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    types_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    types_pb2.FINISH_REASON_ABORTED: FinishReason.ABORTED,
    types_pb2.FINISH_REASON_ERROR: FinishReason.ERROR,
}


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a request cost. `cached_tokens` are prompt tokens that came from the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    queue_seconds: float
    load_seconds: float
    prefill_seconds: float
    decode_seconds: float


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """Log-probability of one candidate, from the model's distribution before temperature, penalties and filters."""

    token_id: int
    text: str
    logprob: float


@dataclass(frozen=True, kw_only=True)
class PositionLogprobs:
    """Log-probabilities at one position: of the token that is there, and of the likeliest ones in falling order.

    `chosen` is None at the first position of a prompt, which nothing comes before.
    """

    chosen: TokenLogprob | None
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True, kw_only=True)
class Output:
    """One of the `n` outputs. `token_ids` and `logprobs` are empty unless they were asked for.

    `matched_stop` is the stop string or the stop token that ended it, if one did.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...]
    finish_reason: FinishReason | None
    matched_stop: str | int | None


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A whole answer. Text, tokens, log-probabilities and end of the first output are here too."""

    outputs: tuple[Output, ...]
    prompt_logprobs: tuple[PositionLogprobs, ...]
    adapter_version: str
    seed: int
    request_id: str
    usage: Usage | None

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.outputs[0].token_ids

    @property
    def logprobs(self) -> tuple[PositionLogprobs, ...]:
        return self.outputs[0].logprobs

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.outputs[0].finish_reason


@dataclass(frozen=True, kw_only=True)
class Delta(Output):
    """What a stream has to say about the output `index` since the delta before.

    `token_offset` counts the tokens of the output delivered before this delta. `finish_reason` is there on the last
    delta of each output, `usage` on the last delta of all. `adapter_version`, `seed`, `request_id` and
    `prompt_logprobs` are there on the first.
    """

    token_offset: int
    prompt_logprobs: tuple[PositionLogprobs, ...]
    adapter_version: str
    seed: int
    request_id: str
    usage: Usage | None


@dataclass(frozen=True, kw_only=True)
class Model:
    """Something a prompt can be sent to: the base model (`adapter_id` empty) or an adapter."""

    adapter_id: str
    adapter_version: str
    base_model: str
    max_context_tokens: int


@dataclass(frozen=True, kw_only=True)
class ModuleEffect:
    """What an adapter does to one module, over all layers that have it. `delta_norm` is that of scaling * B A."""

    module: str
    num_layers: int
    min_lora_rank: int
    max_lora_rank: int
    parameter_bytes: int
    delta_norm: float


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """One adapter of the store. `created_at_seconds` counts from the Unix epoch."""

    adapter_id: str
    adapter_version: str
    base_model: str
    max_lora_rank: int
    packed_bytes: int
    created_at_seconds: float
    modules: tuple[ModuleEffect, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PushResult:
    """`created` is False when the id already pointed to these bytes."""

    adapter: Adapter
    created: bool
    warnings: tuple[str, ...]


def generation(response: gateway_pb2.GenerateResponse) -> Generation:
    outputs = list(response.outputs) or [gateway_pb2.Output()]
    return Generation(
        outputs=tuple(Output(**_output_fields(output)) for output in outputs),
        prompt_logprobs=_logprobs(response.prompt_logprobs),
        adapter_version=response.adapter_version,
        seed=response.seed,
        request_id=response.request_id,
        usage=_usage(response),
    )


def deltas(response: gateway_pb2.GenerateResponse) -> Iterator[Delta]:
    """One delta for each output of the message, what concerns all of them on the first or, the usage, on the last; an
    empty one for a message without outputs."""
    outputs = list(response.outputs) or [gateway_pb2.Output()]
    for position, output in enumerate(outputs):
        yield Delta(
            **_output_fields(output),
            token_offset=output.token_offset,
            prompt_logprobs=_logprobs(response.prompt_logprobs) if position == 0 else (),
            adapter_version=response.adapter_version,
            seed=response.seed,
            request_id=response.request_id,
            usage=_usage(response) if position == len(outputs) - 1 else None,
        )


def model(proto: gateway_pb2.Model) -> Model:
    return Model(
        adapter_id=proto.adapter_id,
        adapter_version=proto.adapter_version,
        base_model=proto.base_model,
        max_context_tokens=proto.max_context_tokens,
    )


def adapter(proto: adapter_store_pb2.Adapter) -> Adapter:
    return Adapter(
        adapter_id=proto.adapter_id,
        adapter_version=proto.adapter_version,
        base_model=proto.base_model,
        max_lora_rank=proto.max_lora_rank,
        packed_bytes=proto.packed_bytes,
        created_at_seconds=proto.created_at_seconds,
        modules=tuple(map(_module_effect, proto.modules)),
    )


def _module_effect(proto: adapter_store_pb2.ModuleEffect) -> ModuleEffect:
    return ModuleEffect(
        module=types_pb2.LoraModule.Name(proto.module).removeprefix("LORA_MODULE_").lower(),
        num_layers=proto.num_layers,
        min_lora_rank=proto.min_lora_rank,
        max_lora_rank=proto.max_lora_rank,
        parameter_bytes=proto.parameter_bytes,
        delta_norm=proto.delta_norm,
    )


def push_result(proto: adapter_store_pb2.UploadAdapterResponse) -> PushResult:
    return PushResult(adapter=adapter(proto.adapter), created=proto.created, warnings=tuple(proto.warnings))


def _output_fields(output: gateway_pb2.Output) -> dict[str, Any]:
    """What an output and a delta of it have in common."""
    matched = output.finish.WhichOneof("matched")
    return {
        "index": output.index,
        "text": output.text,
        "token_ids": tuple(output.token_ids),
        "logprobs": _logprobs(output.logprobs),
        "finish_reason": _FINISH_REASONS.get(output.finish.reason),
        "matched_stop": None if matched is None else getattr(output.finish, matched),
    }


def _logprobs(positions: Iterable[types_pb2.PositionLogprobs]) -> tuple[PositionLogprobs, ...]:
    return tuple(
        PositionLogprobs(
            chosen=_token_logprob(position.chosen) if position.HasField("chosen") else None,
            top=tuple(map(_token_logprob, position.top)),
        )
        for position in positions
    )


def _token_logprob(proto: types_pb2.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(token_id=proto.token_id, text=proto.text, logprob=proto.logprob)


def _usage(response: gateway_pb2.GenerateResponse) -> Usage | None:
    if not response.HasField("usage"):
        return None
    usage = response.usage
    return Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
        queue_seconds=usage.queue_seconds,
        load_seconds=usage.load_seconds,
        prefill_seconds=usage.prefill_seconds,
        decode_seconds=usage.decode_seconds,
    )
