"""Which worker a request waits for: where its adapter and its prefix are, unless others have far less work."""

import hashlib
from collections.abc import Collection, Mapping

from scheduler.core.fleet import Fleet
from scheduler.core.model import Request
from scheduler.core.settings import Settings
from scheduler.core.worker import Worker

# No worker is given a cold adapter when it has more than this many times the mean number of them.
_ADAPTER_IMBALANCE = 1.25


class Placement:
    """Chooses a worker's line for each arrival, and what an idle worker takes over from others. O(workers)."""

    def __init__(self, fleet: Fleet, settings: Settings) -> None:
        self._fleet = fleet
        self._settings = settings

    @property
    def workers(self) -> list[Worker]:
        """Those that take work."""
        return self._fleet.ready

    def load(self, worker: Worker) -> int:
        """Tokens in front of a newcomer: on the worker and in its line."""
        return worker.outstanding_tokens + worker.line.num_tokens

    def is_far_above(self, load: float, other: float) -> bool:
        """Whether the first load in tokens is so much greater that affinity does not count any more."""
        return load > self._settings.spill_ratio * other + self._settings.spill_margin_tokens

    def choose(self, request: Request, workers: Collection[Worker]) -> Worker | None:
        """The one of `workers` that the request waits for; None when none of them could ever take it.

        Its homes are the workers that have the adapter or will have it. At low load all requests of an adapter go to
        one home, so that it can be evicted elsewhere; the homes share what is too much for one; and when even the
        least loaded home has far more work than another worker, that one becomes a home too. So an adapter has as
        many homes as its load needs. A cold adapter goes to the first worker of its rendezvous order that is not far
        above the others, in work and in adapters (consistent hashing with bounded loads, Mirrokni et al. 2018): mostly
        the same one each time, whatever else was asked before.
        """
        loads = {
            worker: (
                worker.outstanding_tokens + worker.line.num_tokens - worker.cached_tokens(request),
                worker.given_tokens,
                worker.worker_id,
            )
            for worker in workers
            if worker.could_ever_take(request)
        }
        if not loads:
            return None
        least = min(loads, key=loads.__getitem__)
        if not request.adapter:
            return least
        homes = [worker for worker in loads if self._is_home(worker, request.adapter)]
        if not homes:
            return self._home_of_cold(request.adapter, loads, least)
        nearest = min(homes, key=lambda worker: loads[worker])
        if self.is_far_above(loads[nearest][0], loads[least][0]):
            return least
        if any(home.cached_tokens(request) for home in homes):
            return nearest
        near = [home for home in homes if not self.is_far_above(loads[home][0], loads[nearest][0])]
        return max(near, key=lambda worker: rendezvous(request.adapter, worker.worker_id))

    def _home_of_cold(self, adapter: str, loads: Mapping[Worker, tuple[int, int, str]], least: Worker) -> Worker:
        counts = {worker: self._num_adapters(worker) for worker in loads}
        most = -(-_ADAPTER_IMBALANCE * (sum(counts.values()) + 1) // len(counts))
        near = [
            worker
            for worker in loads
            if counts[worker] < most and not self.is_far_above(loads[worker][0], loads[least][0])
        ]
        return max(near or [least], key=lambda worker: rendezvous(adapter, worker.worker_id))

    def num_homes(self, adapter: str) -> int:
        """Workers that have the adapter, or will; 0 for the base model."""
        return sum(self._is_home(worker, adapter) for worker in self._fleet.workers) if adapter else 0

    def _num_adapters(self, worker: Worker) -> int:
        """About as many as it has or will have. Those that nobody uses now count too: their requests come back."""
        return max(len(worker.residents), len(worker.in_use.names)) + worker.line.num_adapters

    def _is_home(self, worker: Worker, adapter: str) -> bool:
        return worker.has(adapter) or worker.line.has(adapter)


def rendezvous(adapter: str, worker_id: str) -> int:
    """Highest random weight (Thaler and Ravishankar 1998): each adapter has its own order of the workers."""
    data = f"{adapter}\0{worker_id}".encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
