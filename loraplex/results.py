"""What the clients return: frozen dataclasses, made from protobuf in one place."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

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
class Generation:
    """A whole answer. `token_ids` is empty unless `return_token_ids` was set."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    adapter_version: str
    seed: int
    request_id: str
    usage: Usage | None


@dataclass(frozen=True, kw_only=True)
class Delta:
    """What a stream has to say since the delta before.

    `token_offset` counts the tokens delivered before this delta. `finish_reason` is there on the last delta with
    text, `usage` on the last delta.
    """

    text: str
    token_ids: tuple[int, ...]
    token_offset: int
    finish_reason: FinishReason | None
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
    output = response.outputs[0] if response.outputs else gateway_pb2.Output()
    return Generation(
        text=output.text,
        token_ids=tuple(output.token_ids),
        finish_reason=_finish_reason(output),
        adapter_version=response.adapter_version,
        seed=response.seed,
        request_id=response.request_id,
        usage=_usage(response),
    )


def deltas(response: gateway_pb2.GenerateResponse) -> Iterator[Delta]:
    """One delta for each output of the message; an empty one for a message that has only usage."""
    outputs = list(response.outputs) or [gateway_pb2.Output()]
    for output in outputs:
        yield Delta(
            text=output.text,
            token_ids=tuple(output.token_ids),
            token_offset=output.token_offset,
            finish_reason=_finish_reason(output),
            adapter_version=response.adapter_version,
            seed=response.seed,
            request_id=response.request_id,
            usage=_usage(response),
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


def _finish_reason(output: gateway_pb2.Output) -> FinishReason | None:
    return _FINISH_REASONS.get(output.finish.reason)


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
