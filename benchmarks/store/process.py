"""A store process to measure."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Self

from benchmarks.hardware import ROOT


class StoreProcess:
    """`python -m adapter_store`; `start_seconds` runs from the command to the ready line."""

    def __init__(self, data_dir: Path, *options: str) -> None:
        command = [sys.executable, "-m", "adapter_store", "--data-dir", str(data_dir), "--log-level", "error", *options]
        started = time.perf_counter()
        self._process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        self.start_seconds = time.perf_counter() - started
        self.address = line.split("grpc=")[1].split()[0]

    @property
    def rss_bytes(self) -> int:
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return 1024 * int(status.split("VmRSS:")[1].split()[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
