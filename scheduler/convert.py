"""Between the wire and the core's plain values."""

from collections.abc import Iterable, Iterator
from typing import cast

import grpc

from common.errors import InvalidArgument
from common.prefix_chain import CHUNK_TOKENS
from loraplex.v1 import scheduler_pb2, types_pb2
from scheduler.core.commands import (
    Abort,
    Action,
    Command,
    Offer,
    Placed,
    Preempt,
    Prefetch,
    Refusal,
    Refused,
    Reorder,
    Revoke,
    StepBudget,
)
from scheduler.core.costs import StepFacts
from scheduler.core.model import (
    Capacity,
    Ending,
    Hello,
    Identity,
    Key,
    Phases,
    Progress,
    Report,
    Request,
    RequestState,
    Residency,
    TenantState,
    Tier,
)

DEFAULT_MAX_TOKENS = 128
# Outputs that ended by themselves: their length says something of the next.
_COMPLETE = (types_pb2.FINISH_REASON_STOP, types_pb2.FINISH_REASON_LENGTH)
# Offers carry whole prompts: many of them travel in several messages.
MAX_BATCH_BYTES = 1024 * 1024

_STATES: dict[int, RequestState | Ending] = {
    scheduler_pb2.REQUEST_STATE_WAITING: RequestState.WAITING,
    scheduler_pb2.REQUEST_STATE_RUNNING: RequestState.RUNNING,
    scheduler_pb2.REQUEST_STATE_PREEMPTED: RequestState.PREEMPTED,
    scheduler_pb2.REQUEST_STATE_FINISHED: Ending.FINISHED,
    scheduler_pb2.REQUEST_STATE_FAILED: Ending.FAILED,
    scheduler_pb2.REQUEST_STATE_REVOKED: Ending.REVOKED,
}
_TIERS = {types_pb2.TIER_STORE: Tier.STORE, types_pb2.TIER_HOST: Tier.HOST, types_pb2.TIER_PAGES: Tier.PAGES}
_TIER_NUMBERS = {tier: number for number, tier in _TIERS.items()}


def to_key(proto: types_pb2.RequestKey) -> Key:
    return Key(proto.request_id, proto.attempt, proto.tenant)


def to_request(spec: types_pb2.RequestSpec, now: float) -> Request:
    """`now` is on the core's clock; the spec itself travels on to the worker."""
    stopping = spec.stopping
    return Request(
        key=to_key(spec.key),
        gateway_id=spec.gateway_id,
        adapter=spec.adapter_version,
        adapter_bytes=spec.adapter_bytes,
        prompt_tokens=len(spec.prompt_token_ids),
        delivered_tokens=len(spec.delivered_token_ids),
        max_tokens=stopping.max_tokens if stopping.HasField("max_tokens") else DEFAULT_MAX_TOKENS,
        num_outputs=max(1, spec.output.n),
        whole=spec.whole,
        deadline=now + spec.remaining_seconds if spec.HasField("remaining_seconds") else None,
        priority=spec.scheduling.priority,
        slo_seconds=spec.scheduling.ttft_slo_seconds if spec.scheduling.HasField("ttft_slo_seconds") else None,
        prefix=tuple(spec.prefix_hashes),
        prefix_chunk_tokens=CHUNK_TOKENS,
        payload=spec,
    )


def to_hello(hello: scheduler_pb2.WorkerHello) -> Hello:
    """Raises InvalidArgument naming a field that a worker must fill in."""
    capacity = hello.capacity
    required = {
        "worker_id": hello.worker_id,
        "address": hello.address,
        "capacity.num_pages": capacity.num_pages,
        "capacity.page_bytes": capacity.page_bytes,
        "capacity.page_size": capacity.page_size,
        "capacity.max_sequences": capacity.max_sequences,
    }
    for field, value in required.items():
        if not value:
            raise InvalidArgument("MISSING_FIELD", f"the hello of a worker has no {field}", field=f"hello.{field}")
    return Hello(
        worker_id=hello.worker_id,
        capacity=Capacity(
            num_pages=capacity.num_pages,
            page_bytes=capacity.page_bytes,
            page_size=capacity.page_size,
            max_sequences=capacity.max_sequences,
            max_step_tokens=capacity.max_step_tokens,
        ),
        identity=_to_identity(hello.model),
        in_flight=tuple(_to_progress(hello.in_flight)),
        resident=tuple(_to_residency(adapter) for adapter in hello.resident),
        scheduler_epoch=hello.scheduler_epoch,
        applied_seq=hello.applied_seq,
    )


def to_report(report: scheduler_pb2.StepReport) -> Report:
    return Report(
        scheduler_epoch=report.scheduler_epoch,
        applied_seq=report.applied_seq,
        progress=tuple(_to_progress(report.progress)),
        residency=tuple(_to_residency(delta.adapter, delta.sequence) for delta in report.residency),
        draining=report.state == scheduler_pb2.WORKER_STATE_DRAINING if report.state else None,
        costs=_to_costs(report.costs) if report.HasField("costs") else None,
        pages=_to_pages(report.memory) if report.HasField("memory") else None,
        number=report.report_number,
    )


def _to_pages(memory: scheduler_pb2.MemoryUsage) -> tuple[int, ...]:
    return (
        memory.free_pages,
        memory.quarantined_pages,
        memory.loading_pages,
        memory.kv_pages,
        memory.prefix_pages,
        memory.adapter_pages,
    )


def _to_costs(costs: scheduler_pb2.StepCosts) -> StepFacts:
    return StepFacts(costs.steps, costs.seconds, costs.prefill_tokens, costs.decode_tokens, costs.distinct_adapters)


def _to_phases(usage: types_pb2.Usage) -> Phases:
    return Phases(usage.queue_seconds, usage.load_seconds, usage.prefill_seconds, usage.decode_seconds)


def _to_identity(model: types_pb2.ModelIdentity) -> Identity:
    names = [field.name for field in model.geometry.DESCRIPTOR.fields]
    geometry = {name: int(getattr(model.geometry, name)) for name in names}
    return Identity(model.base_fingerprint, model.tokenizer_digest, geometry)


def _to_progress(items: Iterable[scheduler_pb2.RequestProgress]) -> Iterator[Progress]:
    """Items without a state say nothing."""
    for item in items:
        if state := _STATES.get(item.state):
            yield Progress(
                to_key(item.key),
                state,
                item.adapter_version,
                item.computed_tokens,
                item.generated_tokens,
                item.finish_reason in _COMPLETE,
                _to_phases(item.usage) if item.HasField("usage") else None,
            )


def _to_residency(adapter: scheduler_pb2.ResidentAdapter, sequence: int = 0) -> Residency:
    return Residency(adapter.adapter_version, _TIERS.get(adapter.tier, Tier.STORE), adapter.num_pages, sequence)


def from_residency(residency: Residency) -> scheduler_pb2.ResidentAdapter:
    return scheduler_pb2.ResidentAdapter(
        adapter_version=residency.adapter, tier=_TIER_NUMBERS[residency.tier], num_pages=residency.num_pages
    )


def from_tenant(tenant: TenantState) -> scheduler_pb2.TenantSnapshot:
    return scheduler_pb2.TenantSnapshot(
        tenant=tenant.tenant,
        weight=tenant.weight,
        queued_requests=tenant.queued_requests,
        queued_seconds=tenant.queued_seconds,
        service=tenant.service,
        deficit=tenant.deficit,
    )


def from_answer(answer: Placed | Refused) -> scheduler_pb2.ConnectResponse:
    key = _from_key(answer.key)
    if isinstance(answer, Placed):
        tier = types_pb2.TIER_UNSPECIFIED if answer.tier is None else _TIER_NUMBERS[answer.tier]
        placed = scheduler_pb2.Placed(key=key, worker_id=answer.worker_id, adapter_tier=tier)
        return scheduler_pb2.ConnectResponse(placed=placed)
    return scheduler_pb2.ConnectResponse(refused=scheduler_pb2.Refused(key=key, error=_from_refusal(answer.refusal)))


def from_commands(scheduler_epoch: int, commands: Iterable[Command]) -> Iterator[scheduler_pb2.RegisterResponse]:
    """The commands in as few messages of about MAX_BATCH_BYTES as hold them."""
    batch, num_bytes = scheduler_pb2.CommandBatch(scheduler_epoch=scheduler_epoch), 0
    for command in commands:
        proto = _from_command(command)
        batch.commands.append(proto)
        num_bytes += proto.ByteSize()
        if num_bytes >= MAX_BATCH_BYTES:
            yield scheduler_pb2.RegisterResponse(commands=batch)
            batch, num_bytes = scheduler_pb2.CommandBatch(scheduler_epoch=scheduler_epoch), 0
    if batch.commands:
        yield scheduler_pb2.RegisterResponse(commands=batch)


def _from_command(command: Command) -> scheduler_pb2.Command:
    proto = scheduler_pb2.Command(seq=command.seq)
    _write_action(proto, command.action)
    return proto


def _write_action(proto: scheduler_pb2.Command, action: Action) -> None:
    match action:
        case Offer():
            assert isinstance(action.request.payload, types_pb2.RequestSpec)
            proto.offer.request.CopyFrom(action.request.payload)
            proto.offer.order_key = action.order_key
            if action.remaining_seconds is not None:
                proto.offer.request.remaining_seconds = action.remaining_seconds
        case Abort():
            proto.abort.key.CopyFrom(_from_key(action.key))
            # Unknown numbers of a newer gateway pass through: proto3 enums are open.
            proto.abort.cause = cast("scheduler_pb2.AbortCause.ValueType", action.cause)
        case Revoke():
            proto.revoke.key.CopyFrom(_from_key(action.key))
        case Reorder():
            proto.reorder.key.CopyFrom(_from_key(action.key))
            proto.reorder.order_key = action.order_key
        case Preempt():
            proto.preempt.key.CopyFrom(_from_key(action.key))
        case Prefetch():
            proto.prefetch.tenant = action.tenant
            proto.prefetch.adapter_version = action.adapter
            proto.prefetch.adapter_bytes = action.adapter_bytes
        case StepBudget():
            proto.step_budget.tokens = action.tokens


def _from_key(key: Key) -> types_pb2.RequestKey:
    return types_pb2.RequestKey(request_id=key.request_id, attempt=key.attempt, tenant=key.tenant)


def _from_refusal(refusal: Refusal) -> types_pb2.RequestError:
    return types_pb2.RequestError(
        code=grpc.StatusCode[refusal.code].value[0],
        reason=refusal.reason,
        message=refusal.message,
        metadata=refusal.metadata,
        retry_after_seconds=refusal.retry_after_seconds,
    )
