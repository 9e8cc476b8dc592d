"""Which of our services may make which call, by a role in its certificate; for ports with mutual TLS.

A role is a name of kind URI in the certificate (RFC 5280, 4.2.1.6): `loraplex://role/gateway`.
"""

from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

import grpc

from common.errors import PermissionDenied
from common.interceptors import KINDS

GATEWAY, WORKER, OPERATOR = "gateway", "worker", "operator"
ROLES = (GATEWAY, WORKER, OPERATOR)
ROLE_URI = "loraplex://role/"

_PACKAGE = "/loraplex.v1."
_CALLERS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "SchedulerService": {
        "Connect": (GATEWAY,),
        "Register": (WORKER,),
        "GetState": (OPERATOR,),
        "Explain": (OPERATOR,),
    },
    "WorkerService": {"Attach": (GATEWAY,)},
    "MemoryService": {
        "GetUsage": (OPERATOR,),
        "ListResident": (OPERATOR,),
        "Pin": (OPERATOR,),
        "Unpin": (OPERATOR,),
        "PrefetchAdapter": (OPERATOR,),
        "Evict": (OPERATOR,),
        "WatchResidency": (OPERATOR,),
    },
    # Users change adapters through the gateway, which has made sure of their tenant.
    "AdapterStoreService": {
        "UploadAdapter": (GATEWAY, OPERATOR),
        "GetAdapter": (GATEWAY, OPERATOR),
        "ListAdapters": (GATEWAY, OPERATOR),
        "DeleteAdapter": (GATEWAY, OPERATOR),
        "SetAlias": (GATEWAY, OPERATOR),
        "ExportAdapter": (GATEWAY, OPERATOR),
        "FetchWeights": (WORKER,),
        "WatchAdapters": (GATEWAY, OPERATOR),
    },
}


def callers(method: str) -> tuple[str, ...] | None:
    """Roles that may call `/PACKAGE.SERVICE/METHOD`; None for what is not ours: health and reflection are for all.

    A method of ours that is in no table may be called by nobody.
    """
    if not method.startswith(_PACKAGE):
        return None
    service, _, name = method.removeprefix(_PACKAGE).partition("/")
    return _CALLERS.get(service, {}).get(name, ())


def roles_in(uris: Iterable[bytes]) -> set[str]:
    """Roles among the names of kind URI of a certificate."""
    prefix = ROLE_URI.encode()
    return {uri.removeprefix(prefix).decode("ascii", "replace") for uri in uris if uri.startswith(prefix)}


class RoleInterceptor(grpc.aio.ServerInterceptor):
    """Refuses callers whose certificate has none of the roles that a call needs; behind `ErrorInterceptor`."""

    async def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        unguarded = await continuation(handler_call_details)
        method = handler_call_details.method
        allowed = callers(method)
        if unguarded is None or allowed is None:
            return unguarded
        handler: Any = unguarded
        kind = KINDS[bool(handler.request_streaming), bool(handler.response_streaming)]
        inner = getattr(handler, kind)

        def call(request: Any, context: Any) -> Any:
            roles = roles_in(context.auth_context().get("peer_uri", ()))
            if roles.isdisjoint(allowed):
                raise PermissionDenied("ROLE_MISSING", _sentence(method, roles, allowed))
            return inner(request, context)

        make = getattr(grpc, f"{kind}_rpc_method_handler")
        guarded: grpc.RpcMethodHandler[Any, Any] = make(call, handler.request_deserializer, handler.response_serializer)
        return guarded


def _sentence(method: str, roles: Iterable[str], allowed: Iterable[str]) -> str:
    has = ", ".join(sorted(roles)) or "none"
    return f"{method} is for the roles {', '.join(allowed) or 'none'}; the caller's certificate has {has}"
