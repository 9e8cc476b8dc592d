"""One service as a child process: started, awaited until it says it is ready, stopped.

A service prints one line `ready NAME KEY=HOST:PORT ...` on standard output when it takes work, and logs JSON lines on
standard error, which go to a file.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from types import FrameType
from typing import IO, Any

from loraplex import tether

_LOG_TAIL_BYTES = 64 * 1024
_ERROR_LEVELS = frozenset({"error", "critical"})


class FleetError(Exception):
    """The fleet cannot start, or cannot go on. The message names the service and says what it logged last."""


class ServiceProcess:
    """A running service. It dies when this process dies (on Linux), and its own children die with it."""

    def __init__(self, name: str, command: Sequence[str], *, working_directory: Path, log: Path) -> None:
        """Starts `command` with standard error in `log`, which is emptied first.

        `ready` gets the addresses of the ready line, or FleetError; `exited` gets the exit code, once no process of the
        service is left.
        """
        self.name = name
        self.log = log
        self.ready: Future[dict[str, str]] = Future()
        self.exited: Future[int] = Future()
        # None when it could not be started
        self._started: Future[subprocess.Popen[str] | None] = Future()
        # Linux sends the parent-death signal when the *thread* that started the child ends: this one waits for it.
        Thread(target=self._watch, args=(command, working_directory), name=name, daemon=True).start()

    @property
    def pid(self) -> int:
        """Raises FleetError when it could not be started."""
        process = self._started.result()
        if process is None:
            raise FleetError(f"{self.name} was not started")
        return process.pid

    def terminate(self) -> None:
        """Asks the service to drain and stop."""
        process = self._started.result()
        if process is not None and not self.exited.done():
            process.terminate()

    def kill(self) -> None:
        """Ends the service and all its children at once."""
        process = self._started.result()
        if process is not None and not self.exited.done():
            _kill_group(process.pid)

    def wait_exited(self, timeout_seconds: float) -> None:
        """Returns when the process is gone, or after `timeout_seconds`."""
        wait([self.exited], timeout_seconds)

    def _watch(self, command: Sequence[str], working_directory: Path) -> None:
        try:
            process = self._spawn(command, working_directory)
        except OSError as error:
            self._started.set_result(None)
            self.ready.set_exception(FleetError(f"{self.name} cannot be started: {error}"))
            self.exited.set_result(-1)
            return
        self._started.set_result(process)
        reader = Thread(target=self._read, args=(process.stdout,), name=f"{self.name} output", daemon=True)
        reader.start()
        code = process.wait()
        _kill_group(process.pid)
        reader.join()
        if not self.ready.done():
            self.ready.set_exception(
                FleetError(f"{self.name} did not start: {last_message(self.log)} (see {self.log})")
            )
        self.exited.set_result(code)

    def _spawn(self, command: Sequence[str], working_directory: Path) -> "subprocess.Popen[str]":
        # -S: the tether needs no site-packages, and starts in half the time without.
        tethered = [sys.executable, "-S", tether.__file__, str(os.getpid()), *command]
        with self.log.open("wb") as log:
            return subprocess.Popen(
                tethered,
                cwd=working_directory,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                encoding="utf-8",
                errors="replace",
                # A Ctrl-C in the terminal is for the launcher, which stops the services in order.
                start_new_session=True,
            )

    def _read(self, output: IO[str]) -> None:
        with output:
            for line in output:
                match line.split():
                    case ["ready", _, *pairs] if not self.ready.done():
                        self.ready.set_result(dict(pair.split("=", 1) for pair in pairs if "=" in pair))


def last_message(log: Path) -> str:
    """The `message` of the last JSON line of level error, else of the last line; plain text is taken as it is."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _LOG_TAIL_BYTES))
        lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    records = [_parse(line) for line in lines]
    errors = [record for record in records if record.get("level") in _ERROR_LEVELS]
    last = (errors or records or [{"message": "it logged nothing"}])[-1]
    return str(last["message"])


def _parse(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        return {"message": line.strip()}
    return record if isinstance(record, dict) and "message" in record else {"message": line.strip()}


def _kill_group(pid: int) -> None:
    """Each service leads a process group of its own."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Makes SIGTERM raise KeyboardInterrupt like Ctrl-C, so that `with` blocks clean up. For the main thread."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
