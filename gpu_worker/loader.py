"""Copies adapters from the host tier into pages, on a thread of its own: the step loop never waits for a load."""

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.packing import PackedLayout
from gpu_worker.memory.pool import PagePool

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HostAdapter:
    """An adapter in the host tier: a file that holds its packed byte string."""

    path: Path
    layout: PackedLayout


@dataclass(frozen=True, slots=True)
class LoadDone:
    """A copy has ended; `failure` is empty when the bytes in the pages have the expected sha256."""

    adapter_version: str
    failure: str
    seconds: float


@dataclass(frozen=True, slots=True)
class _Job:
    adapter_version: str
    host: HostAdapter
    pages: list[int]


class Loader:
    """One copying thread. `on_done` is called from it."""

    def __init__(self, pool: PagePool, on_done: Callable[[LoadDone], None]) -> None:
        self._pool = pool
        self._on_done = on_done
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="adapter-loader", daemon=True)
        self._thread.start()

    def load(self, adapter_version: str, host: HostAdapter, pages: list[int]) -> None:
        """Starts copying; the pages belong to the loader until `on_done`."""
        self._jobs.put(_Job(adapter_version, host, pages))

    def stop(self) -> None:
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            started = time.perf_counter()
            try:
                failure = self._copy(job)
            except Exception as error:
                # Whatever it is, it is this adapter's: the thread must live for the others.
                _log.exception("adapter %s was not copied", job.adapter_version)
                failure = f"the copy failed: {type(error).__name__}"
            self._on_done(LoadDone(job.adapter_version, failure, time.perf_counter() - started))

    def _copy(self, job: _Job) -> str:
        layout = job.host.layout
        try:
            # Copy-on-write: torch wants a writable array, the file must stay as it is.
            data = np.memmap(job.host.path, dtype=np.uint8, mode="c")
        except (OSError, ValueError) as error:
            return f"the cached bytes cannot be read: {error.__class__.__name__}"
        if data.size != layout.total_bytes:
            return f"the cached bytes are {data.size} long, the layout says {layout.total_bytes}"
        self._pool.write(job.pages, data)
        # Hashed where kernels read them: what is verified is what is used.
        sha256 = self._pool.sha256(job.pages, layout.total_bytes)
        return "" if sha256 == layout.sha256 else "the bytes in the pages do not have the recorded sha256"
