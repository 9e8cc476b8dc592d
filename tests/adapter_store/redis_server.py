"""A real redis-server of the test's own, and what may happen to it."""

import random
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import redis

# A server answers within milliseconds; this is for a machine that is busy with something else.
START_SECONDS = 60.0
# A timeout of Redis for tests of something else, on a machine that is busy; none of them waits for it.
PATIENT_SECONDS = 30.0


# Below what the kernel hands out by itself, so that no connection of another test gets a port between its choice and
# its use, or while its server is away.
_PORTS = range(20_000, 32_000)
# One socket for each port that this process has taken, held until it ends: other test processes see the name.
_taken: list[socket.socket] = []


def free_port() -> int:
    """A port that nobody else gets before this process ends."""
    for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
        mark = socket.socket(socket.AF_UNIX)
        try:
            mark.bind(f"\0loraplex-test-port-{port}")
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", port))
        except OSError:
            mark.close()
            continue
        _taken.append(mark)
        return port
    raise AssertionError("no port is free")


class RedisServer:
    """`redis-server` on a free port, in a folder of its own."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        self.options = options
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        program = shutil.which("redis-server")
        if program is None:
            raise AssertionError("these tests need a redis-server on the PATH")
        self.folder.mkdir(exist_ok=True)
        command = [program, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        command += ["--save", "", "--appendonly", "no", *self.options]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        self._wait()

    def stop(self) -> None:
        """kill -9, and gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def call(self, *command: str | int) -> object:
        with redis.Redis(port=self.port) as client:
            return client.execute_command(*command)

    @property
    def version(self) -> str:
        with redis.Redis(port=self.port) as client:
            return str(client.info("server")["redis_version"])

    def save(self) -> Path:
        """A copy of everything, to roll back to."""
        self.call("SAVE")
        return Path(shutil.copy(self.folder / "dump.rdb", self.folder / "saved.rdb"))

    def roll_back(self, saved: Path) -> None:
        self.stop()
        shutil.copy(saved, self.folder / "dump.rdb")
        self.start()

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                self.call("PING")
                return
            except redis.ConnectionError:
                if time.monotonic() > deadline:
                    raise AssertionError((self.folder / "log").read_text()) from None
                time.sleep(0.01)
