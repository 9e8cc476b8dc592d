"""The `loraplex` command."""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from loraplex import errors
from loraplex.commands import adapters, explain, generate, memory, status, up
from loraplex.commands.terminal import one_line
from loraplex.errors import LoraplexError
from loraplex.process import FleetError
from loraplex.tls import TlsError

_DESCRIPTION = "One base model, thousands of LoRA adapters, one batch."
_EPILOG = """\
a first session:
  loraplex up --model ./Llama-3.2-1B --adapters ./loras    start a fleet; leave it running
  loraplex status                                          what does it serve?
  loraplex generate --adapter pirate "Once upon a time"    ask an adapter
  loraplex adapters push poet ./poet-lora                  add one while it runs
exit codes: 0 done, 1 failed, 2 wrong usage
`loraplex COMMAND --help` has examples for each command.
"""
_EXIT_INTERRUPTED = 130

# What to do about an error whose sentence does not say it.
_NEXT_STEPS: dict[type[LoraplexError], str] = {
    errors.NotFound: "`loraplex adapters list` shows what there is",
    errors.AlreadyExists: "push with --replace to move the id to these files",
    errors.Unauthenticated: "ask the operator for a key",
    errors.DeadlineExceeded: "allow more time with --timeout",
    errors.Internal: "look for request {request_id} in the logs of the services",
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loraplex",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"loraplex {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for group in (up, generate, adapters, status, memory, explain):
        group.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code. Wrong usage raises SystemExit(2), as argparse does."""
    arguments = build_parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except LoraplexError as error:
        return _fail(describe(error))
    except (FleetError, OSError, TlsError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _EXIT_INTERRUPTED


def describe(error: LoraplexError) -> str:
    """Reason, sentence, and what to do next."""
    step = _NEXT_STEPS.get(type(error), "").format(request_id=error.request_id)
    if error.reason == "UNREACHABLE":
        step = "start a fleet with `loraplex up --model DIR`, or name another address"
    elif error.reason == "TLS_REFUSED":
        step = "see --ca, --cert and --key"
    elif error.retry_after_seconds is not None:
        step = f"try again in {error.retry_after_seconds:g} s"
    return f"{error}. Next: {step}" if step else str(error)


def _fail(message: str) -> int:
    print(f"loraplex: {one_line(message)}", file=sys.stderr)
    return 1


def _version() -> str:
    try:
        return version("loraplex")
    except PackageNotFoundError:
        return "(not installed)"
