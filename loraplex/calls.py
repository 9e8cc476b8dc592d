"""What every call of both clients has: channel settings, a request id, and errors as exceptions."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from loraplex.errors import from_rpc_error

DEFAULT_ADDRESS = "127.0.0.1:50051"
# Of calls that do not generate.
DEFAULT_TIMEOUT_SECONDS = 30.0
REQUEST_ID_KEY = "x-request-id"

CHANNEL_OPTIONS: list[tuple[str, int]] = [
    # A dead gateway is noticed within 35 s; without ping_timeout_ms it takes a minute more.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    # The default of 2 stops the pings on a stream that waits in a queue.
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # A connection of its own for each client: about a hundred streams fill one.
    ("grpc.use_local_subchannel_pool", 1),
]

Metadata = tuple[tuple[str, str], ...]


@contextmanager
def calling(address: str, request_id: str = "") -> Iterator[Metadata]:
    """Gives the metadata for one call to `address`; its failure becomes a `LoraplexError` with the same request id."""
    request_id = request_id or uuid.uuid4().hex
    try:
        yield ((REQUEST_ID_KEY, request_id),)
    except grpc.RpcError as error:
        raise from_rpc_error(error, address=address, request_id=request_id) from error
