"""The errors a service may show to its caller, and the one table from error to gRPC status.

LoraplexError
├── InvalidArgument      INVALID_ARGUMENT     a field is wrong; retrying cannot help
├── Unauthenticated      UNAUTHENTICATED      no credential, or a wrong one
├── PermissionDenied     PERMISSION_DENIED    an admin verb without the role
├── NotFound             NOT_FOUND            unknown, or not yours: the same words for both
├── AlreadyExists        ALREADY_EXISTS       the id points to other bytes
├── Conflict             ABORTED              compare-and-set lost; read again, then retry
├── FailedPrecondition   FAILED_PRECONDITION  valid, but not in this state of the system
├── ResourceExhausted    RESOURCE_EXHAUSTED   a quota or a queue is full; retry later
├── Unavailable          UNAVAILABLE          nobody can do it now; retry later
├── DeadlineExceeded     DEADLINE_EXCEEDED    the caller's deadline passed
├── DataLoss             DATA_LOSS            stored bytes fail their checksum
├── Unimplemented        UNIMPLEMENTED        a later release will do it
└── Internal             INTERNAL             a bug; the message names only the request id

A message names the limit and the value, is written for a developer, and never holds a prompt, a key or a path.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from loraplex.v1 import types_pb2

_Detail = TypeVar("_Detail", bound=Message)

DOMAIN = "loraplex"
# A status above 8 KB is at times replaced by RESOURCE_EXHAUSTED on its way; ours stays far below.
MAX_MESSAGE_CHARACTERS = 1000


class LoraplexError(Exception):
    """A failure with a stable `reason`, a sentence, and what a machine needs to react to it."""

    code: ClassVar[grpc.StatusCode]

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        field: str = "",
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message[:MAX_MESSAGE_CHARACTERS]
        self.metadata = dict(metadata or {})
        self.field = field
        self.retry_after_seconds = retry_after_seconds


class InvalidArgument(LoraplexError):
    code = grpc.StatusCode.INVALID_ARGUMENT


class Unauthenticated(LoraplexError):
    code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDenied(LoraplexError):
    code = grpc.StatusCode.PERMISSION_DENIED


class NotFound(LoraplexError):
    code = grpc.StatusCode.NOT_FOUND


class AlreadyExists(LoraplexError):
    code = grpc.StatusCode.ALREADY_EXISTS


class Conflict(LoraplexError):
    code = grpc.StatusCode.ABORTED


class FailedPrecondition(LoraplexError):
    code = grpc.StatusCode.FAILED_PRECONDITION


class ResourceExhausted(LoraplexError):
    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class Unavailable(LoraplexError):
    code = grpc.StatusCode.UNAVAILABLE


class DeadlineExceeded(LoraplexError):
    code = grpc.StatusCode.DEADLINE_EXCEEDED


class DataLoss(LoraplexError):
    code = grpc.StatusCode.DATA_LOSS


class Unimplemented(LoraplexError):
    code = grpc.StatusCode.UNIMPLEMENTED


class Internal(LoraplexError):
    code = grpc.StatusCode.INTERNAL


# google.rpc.Code number -> class, for errors that arrive from another process.
BY_CODE: dict[int, type[LoraplexError]] = {
    error.code.value[0]: error
    for error in (
        InvalidArgument,
        Unauthenticated,
        PermissionDenied,
        NotFound,
        AlreadyExists,
        Conflict,
        FailedPrecondition,
        ResourceExhausted,
        Unavailable,
        DeadlineExceeded,
        DataLoss,
        Unimplemented,
        Internal,
    )
}


def _pack(message: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def to_status(error: LoraplexError) -> status_pb2.Status:
    """The rich status: ErrorInfo always, RetryInfo and BadRequest where they apply (AIP-193)."""
    details = [_pack(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata))]
    if error.retry_after_seconds is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(round(error.retry_after_seconds * 1000))
        details.append(_pack(error_details_pb2.RetryInfo(retry_delay=delay)))
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.message)
        details.append(_pack(error_details_pb2.BadRequest(field_violations=[violation])))
    return status_pb2.Status(code=error.code.value[0], message=error.message, details=details)


def to_proto(error: LoraplexError) -> types_pb2.RequestError:
    """The error as it travels between our processes."""
    proto = types_pb2.RequestError(
        code=error.code.value[0], reason=error.reason, message=error.message, metadata=error.metadata
    )
    if error.retry_after_seconds is not None:
        proto.retry_after_seconds = error.retry_after_seconds
    return proto


def from_proto(proto: types_pb2.RequestError) -> LoraplexError:
    """The inverse of `to_proto`; an unknown code becomes Internal."""
    retry = proto.retry_after_seconds if proto.HasField("retry_after_seconds") else None
    error_class = BY_CODE.get(proto.code, Internal)
    return error_class(proto.reason, proto.message, metadata=proto.metadata, retry_after_seconds=retry)


def from_rpc_error(error: grpc.RpcError, *, peer: str) -> LoraplexError:
    """A failed call to another of our services. `peer` names that service in the messages written here.

    What the peer said on purpose is kept: reason, message, metadata, retry hint. A broken connection is Unavailable;
    anything else is Internal.
    """
    if not isinstance(error, grpc.aio.AioRpcError | grpc.Call):
        return Internal("INTERNAL", f"the call to the {peer} failed")
    code, status = error.code(), _rich_status(error)
    error_class, info = BY_CODE.get(code.value[0], Internal), _detail(status, error_details_pb2.ErrorInfo())
    if info is not None and info.domain == DOMAIN and error_class is not Internal:
        retry = _detail(status, error_details_pb2.RetryInfo())
        seconds = None if retry is None else retry.retry_delay.ToMilliseconds() / 1000
        return error_class(info.reason, status.message, metadata=info.metadata, retry_after_seconds=seconds)
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
        message = f"the {peer} does not answer"
        return Unavailable(f"{peer.upper().replace(' ', '_')}_UNAVAILABLE", message, retry_after_seconds=1.0)
    return Internal("INTERNAL", f"the {peer} failed")


def _rich_status(error: Any) -> status_pb2.Status:
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            return status_pb2.Status.FromString(value)
    return status_pb2.Status()


def _detail(status: status_pb2.Status, wanted: _Detail) -> _Detail | None:
    """`wanted`, filled from the first detail of its type; None when there is none."""
    return wanted if any(detail.Unpack(wanted) for detail in status.details) else None
