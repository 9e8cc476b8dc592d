"""Options of a service: one frozen dataclass is the single list of them.

Each field made by `option()` becomes a flag `--like-this` and an environment variable `LORAPLEX_LIKE_THIS`; the flag
wins.
"""

import argparse
import os
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from common.tls import PemFiles

MAX_PORT = 65535

_Config = TypeVar("_Config")
_BOOLS = {"true": True, "1": True, "false": False, "0": False}


def option(default: Any = MISSING, *, help: str, choices: Sequence[str] = ()) -> Any:
    """A documented field. Without a default the option is required."""
    metadata = {"help": help, "choices": tuple(choices)}
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class ServiceConfig:
    """What every service has. A port of 0 takes a free one; the ready line says which."""

    host: str = option("127.0.0.1", help="address to listen on")
    port: int = option(0, help="gRPC port; 0 takes a free one")
    metrics_port: int = option(0, help="port of /metrics; 0 takes a free one")
    log_level: str = option("info", help="lowest level that is logged", choices=("debug", "info", "warning", "error"))
    drain_seconds: float = option(10.0, help="how long calls in flight may go on after SIGTERM")
    tls_cert: Path | None = option(None, help="PEM file of this service's certificate; with it the gRPC port is TLS")
    tls_key: Path | None = option(None, help="PEM file of that certificate's key")
    tls_ca: Path | None = option(
        None, help="PEM file of the authority of our services: those that are called must have a certificate of it"
    )
    tls_require_client: bool = option(False, help="refuse callers without a certificate of that authority")
    tls_roles: bool = option(
        False, help="refuse callers whose certificate has no role for the call: a URI loraplex://role/NAME in it"
    )
    tls_client_cert: Path | None = option(
        None, help="PEM file of the certificate shown to services that are called; default: this service's own"
    )
    tls_client_key: Path | None = option(None, help="PEM file of that certificate's key")
    health_port: int | None = option(
        None, help="port that answers health alone, never by TLS, for probes; 0 takes a free one; default: none"
    )

    def __post_init__(self) -> None:
        """Raises ValueError naming the option that is out of range, or that needs another."""
        for name, number in (
            ("port", self.port),
            ("metrics_port", self.metrics_port),
            ("health_port", self.health_port),
        ):
            # gRPC takes the remainder of a larger one, and listens there.
            if number is not None and not 0 <= number <= MAX_PORT:
                raise ValueError(f"{name} is {number}; it must be 0 to {MAX_PORT}")
        for name in ("tls", "tls_client"):
            if (getattr(self, f"{name}_cert") is None) != (getattr(self, f"{name}_key") is None):
                raise ValueError(f"{name}_cert and {name}_key need each other")
        if self.tls_require_client and (self.tls_cert is None or self.tls_ca is None):
            raise ValueError("tls_require_client needs tls_cert and tls_ca")
        if self.tls_roles and not self.tls_require_client:
            raise ValueError("tls_roles needs tls_require_client: without a certificate nobody has a role")
        if self.tls_client_cert is not None and self.tls_ca is None:
            raise ValueError("tls_client_cert needs tls_ca: without it services are called without TLS")

    @property
    def server_files(self) -> PemFiles | None:
        """What callers are shown, and checked by; None without TLS."""
        if self.tls_cert is None:
            return None
        return PemFiles(self.tls_cert, self.tls_key, self.tls_ca if self.tls_require_client else None)

    @property
    def client_files(self) -> PemFiles | None:
        """What services that we call are checked by, and shown; None without TLS."""
        if self.tls_ca is None:
            return None
        if self.tls_client_cert is not None:
            return PemFiles(self.tls_client_cert, self.tls_client_key, self.tls_ca)
        return PemFiles(self.tls_cert, self.tls_key, self.tls_ca)


def parse(config_class: type[_Config], program: str, argv: Sequence[str] | None = None) -> _Config:
    """Reads flags, then the environment, then defaults. Exits with a usage message on a bad value, as argparse does."""
    description = (config_class.__doc__ or "").strip()
    parser = argparse.ArgumentParser(
        prog=program, description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    hints = typing.get_type_hints(config_class)
    for spec in fields(config_class):  # type: ignore[arg-type]  # every config is a dataclass
        _add_flag(parser, spec, hints[spec.name])
    arguments = vars(parser.parse_args(argv))
    try:
        return config_class(**arguments)
    except ValueError as error:
        parser.error(str(error))


def _add_flag(parser: argparse.ArgumentParser, spec: "Field[Any]", hint: Any) -> None:
    flag, variable = "--" + spec.name.replace("_", "-"), "LORAPLEX_" + spec.name.upper()
    value_type = _value_type(hint)
    default = None if spec.default is MISSING else spec.default
    required = spec.default is MISSING
    if variable in os.environ:
        try:
            default, required = _from_text(os.environ[variable], value_type, spec.metadata["choices"]), False
        except ValueError as error:
            parser.error(f"{variable}={os.environ[variable]!r}: {error}")
    help_text = f"{spec.metadata['help']} [{variable}]"
    if value_type is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=help_text)
        return
    choices = spec.metadata["choices"] or None
    parser.add_argument(flag, type=value_type, default=default, required=required, choices=choices, help=help_text)


def _from_text(text: str, value_type: Any, choices: Sequence[str]) -> Any:
    """The value of an environment variable; argparse checks only what comes from a flag."""
    if value_type is bool:
        if text.lower() not in _BOOLS:
            raise ValueError(f"choose from {', '.join(_BOOLS)}")
        return _BOOLS[text.lower()]
    if choices and text not in choices:
        raise ValueError(f"choose from {', '.join(choices)}")
    return value_type(text)


def _value_type(hint: Any) -> Any:
    """The type inside `T | None`."""
    if isinstance(hint, types.UnionType):
        hint = next(argument for argument in typing.get_args(hint) if argument is not types.NoneType)
    return {Path: Path, int: int, float: float, bool: bool, str: str}[hint]
