"""Who is calling."""

from typing import Any

DEFAULT_TENANT = "default"


def tenant_of(context: Any) -> str:
    """The verified tenant of a call. Without keys there is one tenant."""
    return DEFAULT_TENANT
