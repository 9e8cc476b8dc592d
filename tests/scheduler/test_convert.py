"""What crosses the edge keeps its meaning."""

from typing import Any

import grpc
import pytest

from common.errors import InvalidArgument
from loraplex.v1 import scheduler_pb2, types_pb2
from scheduler.config import SchedulerConfig
from scheduler.convert import MAX_BATCH_BYTES, from_answer, from_commands, to_hello, to_report, to_request
from scheduler.core.commands import Command, Offer, Refusal, Refused
from scheduler.core.model import Ending, Key, Reason, RequestState, Tier
from scheduler.core.settings import Settings
from tests.scheduler.fakes import make_key, make_model, make_spec


def test_a_request_keeps_its_sizes_and_its_deadline() -> None:
    spec = make_spec("r", "a", prompt=5, max_tokens=7, attempt=2, delivered_token_ids=[1, 2], remaining_seconds=3.0)
    spec.output.n, spec.whole = 4, True
    request = to_request(spec, now=10.0)
    assert request.key == Key("r", 2, "default")
    assert (request.adapter, request.adapter_bytes, request.num_outputs) == ("a", 100, 4)
    assert (request.prompt_tokens, request.delivered_tokens, request.max_tokens) == (5, 2, 7)
    assert (request.deadline, request.whole) == (13.0, True)
    assert request.payload is spec


def test_a_request_has_defaults() -> None:
    request = to_request(types_pb2.RequestSpec(key=make_key("r")), now=10.0)
    assert (request.adapter, request.max_tokens, request.num_outputs, request.deadline) == ("", 128, 1, None)
    assert not request.whole


def test_progress_without_a_state_is_skipped() -> None:
    states = [
        scheduler_pb2.REQUEST_STATE_UNSPECIFIED,
        scheduler_pb2.REQUEST_STATE_PREEMPTED,
        scheduler_pb2.REQUEST_STATE_FAILED,
    ]
    progress = [scheduler_pb2.RequestProgress(key=make_key(str(state)), state=state) for state in states]
    report = to_report(scheduler_pb2.StepReport(progress=progress))
    assert [item.state for item in report.progress] == [RequestState.PREEMPTED, Ending.FAILED]


def test_every_request_state_has_a_meaning() -> None:
    for name, number in scheduler_pb2.RequestState.items():
        report = scheduler_pb2.StepReport(progress=[scheduler_pb2.RequestProgress(state=number)])
        assert len(to_report(report).progress) == (name != "REQUEST_STATE_UNSPECIFIED")


def test_an_adapter_that_a_worker_does_not_have_is_in_the_store() -> None:
    tiers = [types_pb2.TIER_PAGES, types_pb2.TIER_HOST, types_pb2.TIER_STORE, types_pb2.TIER_UNSPECIFIED]
    deltas = [
        scheduler_pb2.ResidencyDelta(adapter=scheduler_pb2.ResidentAdapter(adapter_version="a", tier=tier))
        for tier in tiers
    ]
    report = to_report(scheduler_pb2.StepReport(residency=deltas, state=scheduler_pb2.WORKER_STATE_DRAINING))
    assert [change.tier for change in report.residency] == [Tier.PAGES, Tier.HOST, Tier.STORE, Tier.STORE]
    assert report.draining


def test_geometry_is_compared_field_by_field() -> None:
    capacity = scheduler_pb2.WorkerCapacity(num_pages=1, page_bytes=1, page_size=1, max_sequences=1)
    hello = scheduler_pb2.WorkerHello(worker_id="w", address="a:1", model=make_model(), capacity=capacity)
    identity = to_hello(hello).identity
    assert identity.geometry.keys() == {field.name for field in types_pb2.ModelGeometry.DESCRIPTOR.fields}
    assert identity.max_context_tokens == 256


@pytest.mark.parametrize("field", ["worker_id", "address", "capacity"])
def test_a_hello_must_be_complete(field: str) -> None:
    capacity = scheduler_pb2.WorkerCapacity(num_pages=1, page_bytes=1, page_size=1, max_sequences=1)
    fields: dict[str, Any] = {"worker_id": "w", "address": "a:1", "capacity": capacity}
    del fields[field]
    hello = scheduler_pb2.WorkerHello(model=make_model(), **fields)
    with pytest.raises(InvalidArgument, match=field):
        to_hello(hello)


def test_a_refusal_keeps_its_code_and_its_hint() -> None:
    refusal = Refusal("RESOURCE_EXHAUSTED", "QUEUE_FULL", "full", {"limit": "1"}, 2.0)
    error = from_answer(Refused(Key("r", 0, "t"), refusal)).refused.error
    assert error.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    assert (error.reason, error.message, dict(error.metadata)) == ("QUEUE_FULL", "full", {"limit": "1"})
    assert error.retry_after_seconds == 2.0


def test_long_prompts_travel_in_several_messages() -> None:
    request = to_request(make_spec("r", prompt=100_000), now=0.0)
    assert isinstance(request.payload, types_pb2.RequestSpec)
    request.payload.prompt_token_ids[:] = [2**31] * 100_000
    commands = [Command(seq, Offer(request, None, Reason.COLD, None, 0.0, 1)) for seq in range(1, 8)]
    messages = list(from_commands(5, commands))
    assert len(messages) > 1
    assert [command.seq for message in messages for command in message.commands.commands] == list(range(1, 8))
    assert all(message.commands.scheduler_epoch == 5 for message in messages)
    assert max(message.ByteSize() for message in messages) < 2 * MAX_BATCH_BYTES


def test_every_setting_is_an_option_with_the_same_default() -> None:
    assert SchedulerConfig().settings == Settings()
