"""The workers: who is registered, who was lost a moment ago, and since when nobody takes work."""

import itertools
from dataclasses import dataclass

from scheduler.core.clock import Clock
from scheduler.core.homes import Home, Homes
from scheduler.core.identity import check_identity
from scheduler.core.lines import Line
from scheduler.core.model import Capacity, Hello, Identity
from scheduler.core.policies.protocol import Policy
from scheduler.core.settings import Settings
from scheduler.core.worker import Worker


class FencedError(Exception):
    """A worker that reported nonsense is kept out for a while."""


@dataclass(frozen=True, slots=True)
class LostWorker:
    """A worker whose stream broke. Its requests are remembered until `until`, in case only the stream broke."""

    worker: Worker
    until: float


class Fleet:
    """Workers by id. Every `now` is in seconds on the caller's clock."""

    def __init__(self, settings: Settings, policy: Policy, epoch: int, clock: Clock) -> None:
        self.homes = Homes(clock, settings.replica_seconds)
        self.lost: dict[str, LostWorker] = {}
        # What the last worker to register serves; gateways have seen it even when that worker is gone.
        self.identity: Identity | None = None
        # Those that take work, by id.
        self.ready: list[Worker] = []
        # The same in groups of equal capacity.
        self.alike: list[list[Worker]] = []
        self._settings = settings
        self._policy = policy
        self._epoch = epoch
        self._registrations = itertools.count()
        self._workers: dict[str, Worker] = {}
        self._fenced_until: dict[str, float] = {}
        self._sorted: list[Worker] = []
        self._none_ready_since: float | None = clock.now

    @property
    def workers(self) -> list[Worker]:
        """Registered workers by id."""
        return self._sorted

    def get(self, worker_id: str) -> Worker | None:
        return self._workers.get(worker_id)

    def register(self, hello: Hello, now: float) -> tuple[Worker, Worker | None]:
        """The worker as it is now and as it was in an earlier registration that is not forgotten yet.

        Raises IdentityMismatchError when it serves something else than the others, FencedError while it is kept out.
        """
        for other in self.workers:
            if other.worker_id != hello.worker_id:
                check_identity(hello.worker_id, hello.identity, other.worker_id, other.identity)
        if now < self._fenced_until.get(hello.worker_id, now):
            raise FencedError(
                f"worker {hello.worker_id} reported nonsense and may register again in "
                f"{self._fenced_until[hello.worker_id] - now:.1f} s"
            )
        self._fenced_until.pop(hello.worker_id, None)
        lost = self.lost.pop(hello.worker_id, None)
        previous = self._workers.get(hello.worker_id) or (lost.worker if lost else None)
        if previous is not None:
            previous.home.close()
        home = Home(hello.worker_id, self.homes)
        line = Line(self._policy, home)
        worker = Worker(hello, self._epoch + next(self._registrations), self._settings, line, home)
        self._workers[hello.worker_id] = worker
        self.identity = hello.identity
        self.note_readiness(now)
        return worker, previous

    def fence(self, worker_id: str, now: float) -> None:
        """Keeps the worker from registering for a while."""
        self._fenced_until[worker_id] = now + self._settings.fence_seconds

    def lose(self, worker_id: str, now: float) -> None:
        """Its stream broke. Raises KeyError when it is not registered."""
        worker = self._workers.pop(worker_id)
        worker.home.close()
        self.lost[worker_id] = LostWorker(worker, now + self._settings.worker_grace_seconds)
        self.note_readiness(now)

    def take_expired(self, now: float) -> list[Worker]:
        """Lost workers whose grace is over; they are forgotten."""
        expired = [worker_id for worker_id, lost in self.lost.items() if lost.until <= now]
        return [self.lost.pop(worker_id).worker for worker_id in expired]

    def note_readiness(self, now: float) -> None:
        """To be called when a worker came, went, or changed its state."""
        self._sorted = [self._workers[worker_id] for worker_id in sorted(self._workers)]
        self.ready = [worker for worker in self._sorted if not worker.draining]
        groups: dict[Capacity, list[Worker]] = {}
        for worker in self.ready:
            groups.setdefault(worker.capacity, []).append(worker)
        self.alike = list(groups.values())
        if self.ready:
            self._none_ready_since = None
        elif self._none_ready_since is None:
            self._none_ready_since = now

    def seconds_without_worker(self, now: float) -> float:
        """How long no worker has taken work; 0 when one does."""
        return 0.0 if self._none_ready_since is None else now - self._none_ready_since

    @property
    def grace_end(self) -> float | None:
        """When queued requests are refused because nobody takes work; None while one does."""
        if self._none_ready_since is None:
            return None
        return self._none_ready_since + self._settings.worker_grace_seconds
