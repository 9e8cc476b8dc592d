"""Which worker a request waits for: where its adapter and its prefix are, unless others have far less work."""

import hashlib
from collections.abc import Iterator, Mapping

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

    def choose(self, request: Request) -> Worker | None:
        """The worker that the request waits for; None when none of those that take work could ever take it.

        Its homes are the workers that have the adapter or will have it. At low load all requests of an adapter go to
        one home, so that it can be evicted elsewhere; the homes share what is too much for one; and when even the
        least loaded home has far more work than another worker, that one becomes a home too, unless another has lately.
        So an adapter has as many homes as its load needs. A cold adapter goes to the first worker of its rendezvous
        order that is not far above the others, in work and in adapters (consistent hashing with bounded loads,
        Mirrokni et al. 2018): mostly the same one each time, whatever else was asked before.
        """
        loads = self._loads(request)
        if not loads:
            return None
        least = min(loads, key=loads.__getitem__)
        if not request.adapter:
            return least
        homes = [worker for worker in self._homes_of(request.adapter) if worker in loads]
        if not homes:
            return self._home_of_cold(request.adapter, loads, least)
        nearest = min(homes, key=loads.__getitem__)
        if self.is_far_above(loads[nearest][0], loads[least][0]) and self.may_grow(request.adapter):
            return least
        if any(home.cached_tokens(request) for home in homes):
            return nearest
        near = [home for home in homes if not self.is_far_above(loads[home][0], loads[nearest][0])]
        return max(near, key=lambda worker: rendezvous(request.adapter, worker.worker_id))

    def may_grow(self, adapter: str) -> bool:
        """Whether the adapter may get another home now."""
        return self._fleet.homes.may_grow(adapter)

    def _loads(self, request: Request) -> dict[Worker, tuple[float, int, str]]:
        """Those that could ever take it, by the tokens in front of it; what its adapter costs there is among them.

        The rank-aware cost of CaraServe (Li et al. 2024) for kernels that take each adapter at its own rank: a step
        takes longer in proportion to the adapter's bytes, for everybody who runs there, for as many steps as the
        answer is expected to have, unless the adapter is in these steps anyway. So large adapters go where few are
        slowed down. It is counted in tokens that could be generated in that time.
        """
        homes = self._fleet.homes.of(request.adapter)
        steps = request.max_tokens if request.expected_tokens is None else request.expected_tokens
        counted_steps = self._settings.rank_cost_share * steps if request.adapter else 0.0
        loads = {}
        for group in self._fleet.alike:
            if not group[0].room.could_ever_fit(request):
                continue
            pages = group[0].room.adapter_pages(request)
            for worker in group:
                tokens: float = worker.outstanding_tokens + worker.line.num_tokens
                if request.prefix:
                    tokens -= worker.cached_tokens(request)
                if counted_steps and not (worker.worker_id in homes and worker.will_use(request.adapter)):
                    tokens += counted_steps * worker.burden_tokens(pages)
                loads[worker] = (tokens, worker.given_tokens, worker.worker_id)
        return loads

    def _home_of_cold(self, adapter: str, loads: Mapping[Worker, tuple[float, int, str]], least: Worker) -> Worker:
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
        return len(self._fleet.homes.of(adapter))

    def is_elsewhere(self, adapter: str, worker: Worker) -> bool:
        """A worker other than this one has the adapter."""
        return any(home is not worker and home.has(adapter) for home in self._homes_of(adapter))

    def _homes_of(self, adapter: str) -> Iterator[Worker]:
        for worker_id in self._fleet.homes.of(adapter):
            if (worker := self._fleet.get(worker_id)) is not None:
                yield worker

    def _num_adapters(self, worker: Worker) -> int:
        """About as many as it has or will have. Those that nobody uses now count too: their requests come back."""
        return max(len(worker.residents), len(worker.in_use.names)) + worker.line.num_adapters


def rendezvous(adapter: str, worker_id: str) -> int:
    """Highest random weight (Thaler and Ravishankar 1998): each adapter has its own order of the workers."""
    data = f"{adapter}\0{worker_id}".encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
