"""What the strings of a request may look like. Raises InvalidArgument that names the field, the limit and the value."""

import re

from common.errors import InvalidArgument

MAX_TENANT_CHARACTERS = 128

_ADAPTER_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}(?<!\.)")
_DIGEST = re.compile(r"[0-9a-f]{64}")


def check_tenant(tenant: str) -> str:
    if not (0 < len(tenant) <= MAX_TENANT_CHARACTERS and tenant.isprintable()):
        message = f"tenant must be 1 to {MAX_TENANT_CHARACTERS} printable characters; it is {tenant[:80]!r}"
        raise InvalidArgument("TENANT_INVALID", message, field="tenant")
    return tenant


def check_adapter_id(adapter_id: str, field: str = "adapter_id") -> str:
    if not _ADAPTER_ID.fullmatch(adapter_id):
        message = (
            f"{field} must match [a-z0-9][a-z0-9._-]{{0,63}} (at most 64 characters) and not end with a dot; "
            f"it is {adapter_id[:80]!r} ({len(adapter_id)} characters)"
        )
        raise InvalidArgument("ADAPTER_ID_INVALID", message, field=field)
    return adapter_id


def is_digest(text: str) -> bool:
    return _DIGEST.fullmatch(text) is not None


def check_digest(digest: str, field: str = "adapter_version") -> str:
    if not is_digest(digest):
        message = f"{field} must be a sha256 in 64 lower-case hex digits; it is {digest[:80]!r}"
        raise InvalidArgument("ADAPTER_VERSION_INVALID", message, field=field)
    return digest
