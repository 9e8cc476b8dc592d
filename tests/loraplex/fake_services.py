"""Four packages with the names of the services, each a script that prints its ready line and waits for a signal."""

import json
import os
import select
from pathlib import Path

from loraplex.fleet import SERVICES

PROGRAM = """
import json
import os
import signal
import subprocess
import sys


def log(level, message):
    print(json.dumps({"level": level, "message": message}), file=sys.stderr, flush=True)


log("info", " ".join(sys.argv[1:]))
if "--fail" in sys.argv:
    log("error", "the disk is full")
    log("info", "good night")
    raise SystemExit(1)
if "--crash" in sys.argv:
    raise RuntimeError("no such option")
if "--child" in sys.argv:
    child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    log("info", str(child.pid))
signal.signal(signal.SIGTERM, signal.SIG_IGN if "--stubborn" in sys.argv else lambda *_: sys.exit(0))
if "--silent" not in sys.argv:
    address = os.environ.get("FAKE_ADDRESS", "127.0.0.1:1")
    print("ready", __package__, f"grpc={address}", "metrics=127.0.0.1:2", flush=True)
if "--end" in sys.argv:
    log("error", "the engine is gone")
    raise SystemExit(3)
while True:
    signal.pause()
"""


def write_services(folder: Path) -> Path:
    for service in SERVICES:
        (folder / service).mkdir(parents=True)
        (folder / service / "__init__.py").touch()
        (folder / service / "__main__.py").write_text(PROGRAM)
    return folder


def write_model(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def logged(log: Path) -> list[str]:
    return [json.loads(line)["message"] for line in log.read_text().splitlines()]


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def ends_within(pid: int, timeout_seconds: float) -> bool:
    """True when a process of somebody else ends in time."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], timeout_seconds)[0])
    finally:
        os.close(descriptor)
