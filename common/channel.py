"""Client channels between our services, with settings that notice a dead peer soon and come back soon."""

import grpc

from common.server import KEEPALIVE_OPTIONS

# Tokenizer files of large vocabularies travel in one message.
INTERNAL_MESSAGE_BYTES = 64 * 1024 * 1024

_CLIENT_OPTIONS = [
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    # The default lets a channel wait 10 s more after its peer is back.
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_receive_message_length", INTERNAL_MESSAGE_BYTES),
    ("grpc.max_send_message_length", INTERNAL_MESSAGE_BYTES),
    # A channel of its own for each connect(): channels with equal arguments would share one connection.
    ("grpc.use_local_subchannel_pool", 1),
]


def connect(address: str) -> grpc.aio.Channel:
    """A channel to another of our services at `HOST:PORT`. Connects lazily; the caller closes it."""
    return grpc.aio.insecure_channel(address, options=[*KEEPALIVE_OPTIONS, *_CLIENT_OPTIONS])
