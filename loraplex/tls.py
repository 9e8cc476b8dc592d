"""Whether and how a client speaks TLS: by whom the gateway must be certified, and who the caller is."""

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from loraplex.calls import CHANNEL_OPTIONS

SYSTEM = "system"


class TlsError(ValueError):
    """A file that TLS needs is missing or holds something else; the message names it."""


@dataclass(frozen=True, kw_only=True)
class Tls:
    """PEM files. Without `ca` a channel is not encrypted; `"system"` trusts the public authorities."""

    ca: str | Path | None = None
    cert: str | Path | None = None
    key: str | Path | None = None

    def __post_init__(self) -> None:
        """Raises TlsError when one of them is given without the other that it needs."""
        if (self.cert is None) != (self.key is None):
            raise TlsError("cert and key need each other")
        if self.cert is not None and self.ca is None:
            raise TlsError(f"cert needs ca: the authority of the other side, or {SYSTEM!r} for the public ones")

    def channel(self, address: str) -> grpc.Channel:
        """A channel for threads. Raises TlsError."""
        credentials = self._credentials()
        if credentials is None:
            return grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        return grpc.secure_channel(address, credentials, options=CHANNEL_OPTIONS)

    def aio_channel(self, address: str) -> grpc.aio.Channel:
        """A channel for an event loop. Raises TlsError."""
        credentials = self._credentials()
        if credentials is None:
            return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        return grpc.aio.secure_channel(address, credentials, options=CHANNEL_OPTIONS)

    def _credentials(self) -> grpc.ChannelCredentials | None:
        if self.ca is None:
            return None
        authority = None if self.ca == SYSTEM else _authority(Path(self.ca))
        if self.cert is None or self.key is None:
            return grpc.ssl_channel_credentials(authority)
        _check_pair(self.cert, self.key)
        return grpc.ssl_channel_credentials(authority, _read(Path(self.key)), _read(Path(self.cert)))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TlsError(f"{path} cannot be read: {error.strerror}") from error


def _authority(path: Path) -> bytes:
    pem = _read(path)
    try:
        # gRPC takes anything, and says later that nobody can be trusted.
        ssl.create_default_context(cadata=pem.decode("ascii", "replace"))
    except ssl.SSLError:
        raise TlsError(f"{path} holds no certificate in PEM form") from None
    return pem


def _check_pair(cert: str | Path, key: str | Path) -> None:
    context: Any = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for path in (cert, key):
        _read(Path(path))
    try:
        # A password of its own: else OpenSSL asks at the terminal.
        context.load_cert_chain(cert, key, password=lambda: "none")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise TlsError(f"the key in {key} does not belong to the certificate in {cert}") from None
        raise TlsError(f"{cert} and {key} are no certificate and plain key in PEM form") from None
