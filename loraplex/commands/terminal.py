"""What the sub-commands share: the gateway option, tables, and a progress line."""

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from loraplex.calls import DEFAULT_ADDRESS
from loraplex.client import Client
from loraplex.tls import Tls

GATEWAY_VARIABLE = "LORAPLEX_GATEWAY"
DIGEST_CHARACTERS = 12
BAR_CHARACTERS = 20


def gateway_option() -> argparse.ArgumentParser:
    """A parent parser with `--gateway` and the options of TLS."""
    parser = tls_options()
    parser.add_argument(
        "--gateway",
        metavar="HOST:PORT",
        default=os.environ.get(GATEWAY_VARIABLE, DEFAULT_ADDRESS),
        help=f"the gateway to talk to [%(default)s; set by {GATEWAY_VARIABLE}]",
    )
    return parser


def tls_options() -> argparse.ArgumentParser:
    """A parent parser with `--ca`, `--cert` and `--key`."""
    parser = argparse.ArgumentParser(add_help=False)
    texts = {
        "ca": "speak TLS with who has a certificate of this authority; `system`: of the public ones",
        "cert": "certificate to show when asked for one",
        "key": "its key",
    }
    for name, text in texts.items():
        variable = f"LORAPLEX_{name.upper()}"
        default = os.environ.get(variable)
        parser.add_argument(f"--{name}", metavar="FILE", default=default, help=f"{text} [set by {variable}]")
    return parser


def tls_of(arguments: argparse.Namespace) -> Tls:
    """Raises TlsError."""
    return Tls(ca=arguments.ca, cert=arguments.cert, key=arguments.key)


def gateway_client(arguments: argparse.Namespace) -> Client:
    """A client of the gateway that was named. Raises TlsError."""
    return Client(arguments.gateway, ca=arguments.ca, cert=arguments.cert, key=arguments.key)


def program() -> str:
    """What the user types to run this command: its name, or its path where the name alone would not be found."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return f"{sys.executable} -m loraplex"
    return called.name if shutil.which(called.name) else shlex.quote(os.path.relpath(called))


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Left-aligned columns, two spaces apart."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    return "\n".join(line.rstrip() for line in lines)


def one_line(text: str) -> str:
    return " ".join(text.split())


def bar(done: int, total: int) -> str:
    """`[#####...............]` for done / total."""
    filled = BAR_CHARACTERS * done // max(1, total)
    return f"[{'#' * filled}{'.' * (BAR_CHARACTERS - filled)}]"


class ProgressLine:
    """A line on standard error that is written over; nothing where that is not a terminal."""

    def __init__(self, output: TextIO | None = None) -> None:
        self._output = output or sys.stderr
        self._shown = self._output.isatty()

    def show(self, text: str) -> None:
        if self._shown:
            self._output.write(f"\r\x1b[K{text}")
            self._output.flush()

    def clear(self) -> None:
        self.show("")
