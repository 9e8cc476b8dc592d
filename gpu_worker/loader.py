"""Copies adapters from the host tier into pages, on a thread of its own: the step loop never waits for a load."""

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from gpu_worker.host_storage import HostBlob, WrongBytesError
from gpu_worker.memory.pool import PagePool
from kernels.cpu.pages import Watch

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadDone:
    """A copy has ended; `failure` is empty when the bytes in the pages have the promised digest."""

    adapter_version: str
    failure: str
    seconds: float


@dataclass(slots=True, eq=False)
class _Job:
    adapter_version: str
    blob: HostBlob
    pages: list[int]
    watch: Watch = field(default_factory=Watch)
    # Of `time.perf_counter`.
    started: float = 0.0


class Loader:
    """One copying thread. `on_done` is called from it, unless `take_done` has the news already."""

    def __init__(self, pool: PagePool, on_done: Callable[[LoadDone], None]) -> None:
        self._pool = pool
        self._on_done = on_done
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        # Those whose end nobody has been told; who takes one out tells it.
        self._untold: dict[_Job, None] = {}
        self._thread = threading.Thread(target=self._work, name="adapter-loader", daemon=True)
        self._thread.start()

    def load(self, adapter_version: str, blob: HostBlob, pages: list[int]) -> None:
        """Starts copying; pages and blob belong to the loader until `on_done` or `take_done` has the adapter."""
        job = _Job(adapter_version, blob, pages)
        self._untold[job] = None
        self._jobs.put(job)

    def take_done(self) -> list[LoadDone]:
        """Copies that have ended well though their thread had no turn at the interpreter since then. On any thread."""
        ended = [(job, at) for job in list(self._untold) if (at := self._ended(job))]
        return [LoadDone(job.adapter_version, "", at - job.started) for job, at in ended if self._is_ours(job)]

    def stop(self) -> None:
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            done = self._do(job)
            if self._is_ours(job):
                self._on_done(done)

    def _is_ours(self, job: _Job) -> bool:
        """True for the first who asks."""
        return self._untold.pop(job, self) is None

    def _ended(self, job: _Job) -> float:
        """The moment, as `time.perf_counter` has it, when the right bytes were in the pages; 0 = not known to be."""
        return 1e-9 * job.watch.ended

    def _do(self, job: _Job) -> LoadDone:
        job.started = time.perf_counter()
        try:
            failure = self._copy(job)
        except Exception as error:
            # Whatever it is, it is this adapter's: the thread must live for the others.
            _log.exception("adapter %s was not copied", job.adapter_version)
            failure = f"the copy failed: {type(error).__name__}"
        return LoadDone(job.adapter_version, failure, time.perf_counter() - job.started)

    def _copy(self, job: _Job) -> str:
        try:
            job.blob.copy_to(self._pool, job.pages, job.watch)
        except WrongBytesError as error:
            return str(error)
        return ""
