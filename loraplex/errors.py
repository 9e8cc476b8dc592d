"""What a call raises, and the one table from gRPC status to exception.

LoraplexError
├── InvalidArgument      a field is wrong; retrying cannot help
├── Unauthenticated      no credential, or a wrong one
├── PermissionDenied     an admin verb without the role
├── NotFound             unknown, or not yours: the same words for both
├── AlreadyExists        the id points to other bytes
├── Conflict             compare-and-set lost; read again, then retry
├── FailedPrecondition   valid, but not in this state of the system
├── ResourceExhausted    a quota or a queue is full; retry later
├── Unavailable          nobody can do it now, or no gateway answers; retry later
├── DeadlineExceeded     the call's timeout passed
├── Cancelled            this side cancelled the call
├── DataLoss             stored bytes fail their checksum
├── Unimplemented        a later release will do it
└── Internal             a bug on the other side; quote the request id
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import grpc
from google.rpc import error_details_pb2, status_pb2

_STATUS_DETAILS_KEY = "grpc-status-details-bin"


class LoraplexError(Exception):
    """A failed call.

    `reason` is stable and UPPER_SNAKE_CASE, `message` a sentence for a developer. `retry_after_seconds` is present
    when a retry may succeed, `request_id` names the request in the logs of the services.
    """

    code: ClassVar[grpc.StatusCode]

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        request_id: str = "",
        retry_after_seconds: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.request_id = request_id
        self.retry_after_seconds = retry_after_seconds
        self.metadata = dict(metadata or {})

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


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


class Cancelled(LoraplexError):
    code = grpc.StatusCode.CANCELLED


class DataLoss(LoraplexError):
    code = grpc.StatusCode.DATA_LOSS


class Unimplemented(LoraplexError):
    code = grpc.StatusCode.UNIMPLEMENTED


class Internal(LoraplexError):
    code = grpc.StatusCode.INTERNAL


BY_CODE: dict[grpc.StatusCode, type[LoraplexError]] = {
    error.code: error
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
        Cancelled,
        DataLoss,
        Unimplemented,
        Internal,
    )
}


def from_rpc_error(error: grpc.RpcError, *, address: str, request_id: str = "") -> LoraplexError:
    """The exception for a failed call to `address`; what the table does not name becomes Internal.

    A failure without ErrorInfo was not written by a service: its reason is the name of the status, UNREACHABLE when
    nobody answered at the address, or TLS_REFUSED when one of the two did not take the other.
    """
    call: Any = error
    code: grpc.StatusCode = call.code() if hasattr(error, "code") else grpc.StatusCode.UNKNOWN
    error_class = BY_CODE.get(code, Internal)
    info, retry_after_seconds = _details(call)
    reason, message = info.reason or code.name, (call.details() if hasattr(error, "details") else "") or code.name
    if error_class is Unavailable and not info.reason:
        reason, message = _unreachable(address, message)
    return error_class(
        reason, message, request_id=request_id, retry_after_seconds=retry_after_seconds, metadata=info.metadata
    )


def _unreachable(address: str, details: str) -> tuple[str, str]:
    """Reason and sentence for a call that reached no service."""
    if sentence := tls_diagnosis(address, details):
        return "TLS_REFUSED", f"{sentence} ({details})"
    return "UNREACHABLE", f"nothing answers at {address} ({details})"


def tls_diagnosis(address: str, details: str) -> str:
    """What a failure to connect says about TLS, as a sentence; empty when it says nothing about it."""
    if "CERTIFICATE_VERIFY_FAILED" in details:
        return f"the certificate of {address} has expired, or is of another authority than the one in `ca`"
    if "Hostname Verification" in details:
        return f"the certificate of {address} is for another name than the one in that address"
    if "WRONG_VERSION_NUMBER" in details:
        return f"{address} does not speak TLS: leave `ca` out"
    cut = any(text in details for text in ("Socket closed", "reset by peer", "Broken pipe"))
    if cut and details.startswith("failed to connect"):
        return f"{address} hangs up: it wants TLS (give `ca`), or a certificate of its callers (give `cert` and `key`)"
    return ""


def _details(call: Any) -> tuple[error_details_pb2.ErrorInfo, float | None]:
    """ErrorInfo and the RetryInfo delay in seconds, as far as the status carries them."""
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    retry_after_seconds: float | None = None
    trailers = call.trailing_metadata() if hasattr(call, "trailing_metadata") else None
    for key, value in trailers or ():
        if key == _STATUS_DETAILS_KEY:
            for detail in status_pb2.Status.FromString(value).details:
                detail.Unpack(info)
                if detail.Unpack(retry):
                    retry_after_seconds = retry.retry_delay.ToTimedelta().total_seconds()
    return info, retry_after_seconds
