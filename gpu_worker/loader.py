"""Copies adapters from the host tier into pages, on a thread of its own: the step loop never waits for a load."""

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from gpu_worker.host_storage import HostBlob, WrongBytesError
from gpu_worker.memory.pool import PagePool

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadDone:
    """A copy has ended; `failure` is empty when the bytes in the pages have the expected sha256."""

    adapter_version: str
    failure: str
    seconds: float


@dataclass(frozen=True, slots=True)
class _Job:
    adapter_version: str
    blob: HostBlob
    pages: list[int]


class Loader:
    """One copying thread. `on_done` is called from it."""

    def __init__(self, pool: PagePool, on_done: Callable[[LoadDone], None]) -> None:
        self._pool = pool
        self._on_done = on_done
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="adapter-loader", daemon=True)
        self._thread.start()

    def load(self, adapter_version: str, blob: HostBlob, pages: list[int]) -> None:
        """Starts copying; pages and blob belong to the loader until `on_done`."""
        self._jobs.put(_Job(adapter_version, blob, pages))

    def stop(self) -> None:
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._on_done(self._do(job))

    def _do(self, job: _Job) -> LoadDone:
        started = time.perf_counter()
        try:
            failure = self._copy(job)
        except Exception as error:
            # Whatever it is, it is this adapter's: the thread must live for the others.
            _log.exception("adapter %s was not copied", job.adapter_version)
            failure = f"the copy failed: {type(error).__name__}"
        return LoadDone(job.adapter_version, failure, time.perf_counter() - started)

    def _copy(self, job: _Job) -> str:
        try:
            job.blob.copy_to(self._pool, job.pages)
        except WrongBytesError as error:
            return str(error)
        return ""
