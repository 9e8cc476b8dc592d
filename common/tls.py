"""Certificates of a service: read from PEM files, checked before they are used, read again when the files change."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import grpc

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes, PrivateKeyTypes
    from cryptography.x509 import Certificate

_log = logging.getLogger(__name__)
_Answer = TypeVar("_Answer")
_Stamp = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class Pem:
    """The bytes of a certificate chain with its key, and of authorities; empty where there are none."""

    cert: bytes = b""
    key: bytes = b""
    ca: bytes = b""
    # When the first certificate of the chain, or an authority, expires first.
    expires: datetime | None = None


@dataclass(frozen=True, slots=True)
class PemFiles:
    """Where they are. Absent files are not read."""

    cert: Path | None = None
    key: Path | None = None
    ca: Path | None = None

    def read(self) -> Pem:
        """Raises OSError naming a file that cannot be read, ValueError naming one that holds something else."""
        cert, key, ca = _bytes(self.cert), _bytes(self.key), _bytes(self.ca)
        chain = _certificates(self.cert, cert) if self.cert is not None else []
        authorities = _certificates(self.ca, ca) if self.ca is not None else []
        if self.key is not None and chain and _private_key(self.key, key).public_key() != _public_key(chain[0]):
            raise ValueError(f"the key in {self.key} does not belong to the certificate in {self.cert}")
        ends = [certificate.not_valid_after_utc for certificate in [*chain[:1], *authorities]]
        return Pem(cert, key, ca, min(ends, default=None))

    def stamp(self) -> _Stamp:
        """Changes with the files. Raises OSError naming one that is not there."""
        stats = [_of_file(path, Path.stat) for path in (self.cert, self.key, self.ca) if path is not None]
        return tuple((stat.st_mtime_ns, stat.st_ino, stat.st_size) for stat in stats)


class RenewedPem:
    """The files as last read. While they are replaced one by one, and do not fit, what was there before stays."""

    def __init__(self, files: PemFiles) -> None:
        """Raises OSError and ValueError as `PemFiles.read` does."""
        self._files = files
        self._stamp = files.stamp()
        self.pem = files.read()
        self._on_expiry: Callable[[float], object] = lambda expires: None

    def follow(self, on_expiry: Callable[[float], object]) -> None:
        """Gives the Unix time at which the certificate ends, now and when there is another. Maybe on another thread."""
        self._on_expiry = on_expiry
        if self.pem.expires is not None:
            on_expiry(self.pem.expires.timestamp())

    def renew(self) -> bool:
        """Reads again what has changed; whether there is something new. Raises nothing."""
        try:
            stamp = self._files.stamp()
            if stamp == self._stamp:
                return False
            # Before reading: what is written in the meantime has another stamp.
            self._stamp = stamp
            pem = self._files.read()
        except (OSError, ValueError) as error:
            _log.warning("the certificate stays as it was: %s", error)
            return False
        if pem == self.pem:
            return False
        self.pem = pem
        _log.info("a new certificate, until %s", pem.expires)
        self.follow(self._on_expiry)
        return True


def server_credentials(renewed: RenewedPem, *, require_client: bool) -> grpc.ServerCredentials:
    """Reads the files again when they have changed, before each handshake: connections that are open stay."""

    def current() -> grpc.ServerCertificateConfiguration:
        pem = renewed.pem
        return grpc.ssl_server_certificate_configuration([(pem.key, pem.cert)], pem.ca or None)

    # None leaves things as they are; the annotations of the library do not know it.
    def fetch() -> Any:
        return current() if renewed.renew() else None

    return grpc.dynamic_ssl_server_credentials(current(), fetch, require_client)


def channel_credentials(pem: Pem) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(pem.ca, pem.key or None, pem.cert or None)


def _bytes(path: Path | None) -> bytes:
    return b"" if path is None else _of_file(path, Path.read_bytes)


def _of_file(path: Path, ask: Callable[[Path], _Answer]) -> _Answer:
    """Raises OSError with the whole sentence for an operator."""
    try:
        return ask(path)
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error.strerror}") from error


def _certificates(path: Path | None, pem: bytes) -> "list[Certificate]":
    # Only where TLS is on: it takes ten megabytes.
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError:
        raise ValueError(f"{path} holds no certificate in PEM form") from None


def _private_key(path: Path, pem: bytes) -> "PrivateKeyTypes":
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        return load_pem_private_key(pem, password=None)
    except TypeError:
        raise ValueError(f"the key in {path} is encrypted") from None
    except ValueError:
        raise ValueError(f"{path} holds no private key in PEM form") from None


def _public_key(certificate: "Certificate") -> "CertificatePublicKeyTypes":
    return certificate.public_key()
