"""Client channels between our services, with settings that notice a dead peer soon and come back soon."""

import json

import grpc

from common.renewed_channel import RenewedChannel
from common.server import KEEPALIVE_OPTIONS
from common.tls import Pem, PemFiles, RenewedPem, channel_credentials

# Tokenizer files of large vocabularies travel in one message.
INTERNAL_MESSAGE_BYTES = 64 * 1024 * 1024

_CLIENT_OPTIONS = [
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    # The default lets a channel wait 10 s more after its peer is back.
    ("grpc.max_reconnect_backoff_ms", 1000),
    # The default takes no notice for 30 s that a name has got other addresses.
    ("grpc.dns_min_time_between_resolutions_ms", 1000),
    ("grpc.max_receive_message_length", INTERNAL_MESSAGE_BYTES),
    ("grpc.max_send_message_length", INTERNAL_MESSAGE_BYTES),
    # A channel of its own for each connect(): channels with equal arguments would share one connection.
    ("grpc.use_local_subchannel_pool", 1),
]


def connect(address: str, *, service: str = "", tls: PemFiles | None = None) -> grpc.aio.Channel:
    """A channel to another of our services at `HOST:PORT`, or any target that gRPC knows. Connects lazily.

    With the full name of a service, calls go only to those addresses behind the target whose health says that they
    serve it (gRFC A17): the active one of several schedulers. With `tls` the peer must show a certificate of that
    authority for the name in the address, and is shown ours if there is one; files that are replaced count for
    calls that begin later. The caller closes the channel.
    Raises OSError and ValueError where the files cannot be used.
    """
    options: list[tuple[str, int | str]] = [*KEEPALIVE_OPTIONS, *_CLIENT_OPTIONS]
    if service:
        config = {"loadBalancingConfig": [{"round_robin": {}}], "healthCheckConfig": {"serviceName": service}}
        options.append(("grpc.service_config", json.dumps(config)))
    if tls is None:
        return grpc.aio.insecure_channel(address, options=options)

    def dial(pem: Pem) -> grpc.aio.Channel:
        return grpc.aio.secure_channel(address, channel_credentials(pem), options=options)

    return RenewedChannel(RenewedPem(tls), dial)
