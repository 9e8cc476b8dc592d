"""The table of errors: complete, reversible, and small enough for a gRPC trailer."""

from collections.abc import Iterator

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from common import errors
from common.errors import BY_CODE, DOMAIN, MAX_MESSAGE_CHARACTERS, Internal, LoraplexError, NotFound, ResourceExhausted
from loraplex.v1 import types_pb2


def subclasses(of: type[LoraplexError] = LoraplexError) -> Iterator[type[LoraplexError]]:
    for error_class in of.__subclasses__():
        yield error_class
        yield from subclasses(error_class)


each_error = pytest.mark.parametrize("error_class", list(subclasses()), ids=lambda error_class: error_class.__name__)


def detail_names(status: status_pb2.Status) -> list[str]:
    return [detail.TypeName() for detail in status.details]


def unpack(status: status_pb2.Status, index: int, into: Message) -> Message:
    assert status.details[index].Unpack(into)
    return into


def rpc_error(code: grpc.StatusCode, details: str = "", status: status_pb2.Status | None = None) -> grpc.RpcError:
    """What an asyncio client sees of a failed call."""
    trailers = grpc.aio.Metadata()
    if status is not None:
        trailers.add("grpc-status-details-bin", status.SerializeToString())
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailers, details)


@each_error
def test_every_error_is_in_the_table_under_its_code(error_class: type[LoraplexError]) -> None:
    assert BY_CODE[error_class.code.value[0]] is error_class


@each_error
def test_the_drawn_tree_names_every_error_with_its_code(error_class: type[LoraplexError]) -> None:
    drawn = [line.split()[1:3] for line in (errors.__doc__ or "").splitlines() if line.startswith(("├", "└"))]
    assert [error_class.__name__, error_class.code.name] in drawn


@each_error
def test_an_error_survives_the_way_between_processes(error_class: type[LoraplexError]) -> None:
    error = error_class("SOME_REASON", "a sentence", metadata={"limit": "8"}, retry_after_seconds=1.5)
    copy = errors.from_proto(errors.to_proto(error))
    assert (type(copy), vars(copy)) == (type(error), vars(error))


def test_an_error_without_a_retry_hint_stays_without_one() -> None:
    assert errors.from_proto(errors.to_proto(NotFound("X", "x"))).retry_after_seconds is None


@pytest.mark.parametrize("code", [0, 1, 999])
def test_a_code_outside_the_table_becomes_internal(code: int) -> None:
    assert type(errors.from_proto(types_pb2.RequestError(code=code, reason="X"))) is Internal


def test_a_long_message_is_cut() -> None:
    assert len(NotFound("X", "x" * 5000).message) == MAX_MESSAGE_CHARACTERS


def test_the_status_carries_reason_and_metadata() -> None:
    status = errors.to_status(NotFound("ADAPTER_NOT_FOUND", "no adapter 'a'", metadata={"adapter_id": "a"}))
    expected = error_details_pb2.ErrorInfo(reason="ADAPTER_NOT_FOUND", domain=DOMAIN, metadata={"adapter_id": "a"})
    assert unpack(status, 0, error_details_pb2.ErrorInfo()) == expected


def test_the_status_of_a_plain_error_carries_nothing_else() -> None:
    assert detail_names(errors.to_status(NotFound("X", "x"))) == ["google.rpc.ErrorInfo"]


def test_the_status_carries_the_retry_delay() -> None:
    retry = error_details_pb2.RetryInfo()
    unpack(errors.to_status(ResourceExhausted("QUEUE_FULL", "full", retry_after_seconds=0.25)), 1, retry)
    assert retry.retry_delay.ToMilliseconds() == 250


def test_the_status_names_the_field() -> None:
    bad_request = error_details_pb2.BadRequest()
    unpack(errors.to_status(errors.InvalidArgument("OUT_OF_RANGE", "top_p is 2", field="top_p")), 1, bad_request)
    assert [violation.field for violation in bad_request.field_violations] == ["top_p"]


@pytest.mark.parametrize(
    "error_class", [error for error in subclasses() if error is not Internal], ids=lambda error: error.__name__
)
def test_what_a_peer_said_on_purpose_is_kept(error_class: type[LoraplexError]) -> None:
    error = error_class("SOME_REASON", "a sentence", metadata={"limit": "8"}, retry_after_seconds=1.5)
    copy = errors.from_rpc_error(rpc_error(error.code, "a sentence", errors.to_status(error)), peer="adapter store")
    assert (type(copy), vars(copy)) == (type(error), vars(error))


@pytest.mark.parametrize(
    "code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED]
)
def test_a_peer_that_does_not_answer_is_unavailable(code: grpc.StatusCode) -> None:
    error = errors.from_rpc_error(rpc_error(code, "connect to 10.0.0.7:50053 failed"), peer="adapter store")
    assert (type(error), error.reason) == (errors.Unavailable, "ADAPTER_STORE_UNAVAILABLE")


def test_the_address_of_a_peer_does_not_reach_the_caller() -> None:
    broken = rpc_error(grpc.StatusCode.UNAVAILABLE, "connect to 10.0.0.7:50053 failed")
    assert "10.0.0.7" not in errors.from_rpc_error(broken, peer="scheduler").message


@pytest.mark.parametrize("code", [grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNIMPLEMENTED])
def test_a_status_without_a_reason_of_ours_is_internal_and_opaque(code: grpc.StatusCode) -> None:
    error = errors.from_rpc_error(rpc_error(code, "Unexpected ValueError: secret"), peer="scheduler")
    assert (type(error), error.message) == (Internal, "the scheduler failed")
