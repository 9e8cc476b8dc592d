"""Slots of one size, the least recently used adapter out, and a step that waits for its load: vLLM's way with LoRA.

Source: vLLM 0.33, `lora/model_manager.py` and `lora/worker_manager.py`: `set_active_adapters` loads inside the step.
"""

import time
from collections.abc import Iterable

from benchmarks.baselines.divided import Slotted
from gpu_worker.host_storage import HostBlob
from gpu_worker.loader import Loader, _Job
from gpu_worker.memory.adapter_cache import AdapterCache
from gpu_worker.memory.eviction import EvictionQueue, LeastRecentlyUsed
from gpu_worker.memory.geometry import PageGeometry
from gpu_worker.prefetch import Moves, Prefetcher


class LeastRecentSlots(Slotted):
    """`Slotted` with the policy of the engines that have slots."""

    def __init__(self, geometry: PageGeometry, num_pages: int) -> None:
        super().__init__(geometry, num_pages)
        self._cold_adapters = EvictionQueue(LeastRecentlyUsed())
        self.adapters = AdapterCache(geometry, self._allocator, self._cold_adapters, self.costs, self.demand)


class NoPrefetch(Prefetcher):
    """Adapters come to the host tier when they are asked for, and into pages when a sequence is admitted."""

    def plan(self) -> Moves:
        moves = Moves()
        for sequence in self._batcher.waiting():
            version = sequence.adapter_version
            if version and version not in self._host and self._memory.adapters.get(version) is None:
                self._ask(sequence.tenant, version, moves)
        return moves

    def early(self, adapter_versions: Iterable[str]) -> list[str]:
        return []


class ThrottledLoader(Loader):
    """Copies as over a bus of `bytes_per_second`, one adapter after the other: a CPU's own copy proves nothing."""

    bytes_per_second = float("inf")

    def _copy(self, job: _Job) -> str:
        failure = super()._copy(job)
        time.sleep(max(0.0, self._until(job) - time.perf_counter()))
        return failure

    def _ended(self, job: _Job) -> float:
        ended = super()._ended(job)
        until = max(ended, self._until(job))
        return until if ended and until <= time.perf_counter() else 0.0

    def _until(self, job: _Job) -> float:
        """The bus has brought the last byte."""
        return job.started + job.blob.num_bytes / self.bytes_per_second


class BlockingLoader(ThrottledLoader):
    """The step that asks for a copy waits for it."""

    def load(self, adapter_version: str, blob: HostBlob, pages: list[int]) -> None:
        self._on_done(self._do(_Job(adapter_version, blob, pages)))
