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

GATEWAY_VARIABLE = "LORAPLEX_GATEWAY"
DIGEST_CHARACTERS = 12
BAR_CHARACTERS = 20


def gateway_option() -> argparse.ArgumentParser:
    """A parent parser with `--gateway`."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--gateway",
        metavar="HOST:PORT",
        default=os.environ.get(GATEWAY_VARIABLE, DEFAULT_ADDRESS),
        help=f"the gateway to talk to [%(default)s; set by {GATEWAY_VARIABLE}]",
    )
    return parser


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
