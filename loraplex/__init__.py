"""loraplex: one base model, thousands of LoRA adapters, one batch.

A call to a running gateway:

    with loraplex.Client("127.0.0.1:50051") as client:
        print(client.generate("hello", adapter="my-adapter", max_tokens=32).text)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loraplex.aio import AsyncClient
    from loraplex.client import Client
    from loraplex.errors import LoraplexError

__all__ = ["AsyncClient", "Client", "LoraplexError"]


def __getattr__(name: str) -> Any:
    """Imports the clients on first use: the services import `loraplex.v1` and need none of them."""
    if name == "Client":
        from loraplex.client import Client

        return Client
    if name == "AsyncClient":
        from loraplex.aio import AsyncClient

        return AsyncClient
    if name == "LoraplexError":
        from loraplex.errors import LoraplexError

        return LoraplexError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
