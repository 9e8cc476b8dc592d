"""Which workers have an adapter, or will have it: its homes. Asking costs what there are of them, not of workers."""

from collections.abc import Collection

from scheduler.core.clock import Clock


class Homes:
    """Adapters of the whole fleet by where they are."""

    def __init__(self, clock: Clock, replica_seconds: float) -> None:
        """An adapter gets at most one more home in `replica_seconds`, see `may_grow`."""
        self._clock = clock
        self._replica_seconds = replica_seconds
        # Adapter -> ids of workers, in the order in which they became its homes.
        self._homes: dict[str, dict[str, None]] = {}
        # Adapter with several homes -> when it got the last of them.
        self._grown_at: dict[str, float] = {}

    def of(self, adapter: str) -> Collection[str]:
        """Ids of the workers."""
        return self._homes.get(adapter, {}).keys()

    def may_grow(self, adapter: str) -> bool:
        """Whether it may have one more home now: churn is bounded in time, whatever the loads do."""
        grown_at = self._grown_at.get(adapter)
        return grown_at is None or self._clock.now - grown_at >= self._replica_seconds

    def add(self, adapter: str, worker_id: str) -> None:
        homes = self._homes.setdefault(adapter, {})
        if homes:
            self._grown_at[adapter] = self._clock.now
        homes[worker_id] = None

    def remove(self, adapter: str, worker_id: str) -> None:
        homes = self._homes[adapter]
        del homes[worker_id]
        if not homes:
            del self._homes[adapter]
            self._grown_at.pop(adapter, None)


class Home:
    """The adapters of one registration of a worker, each as often as there are reasons for it to be there."""

    def __init__(self, worker_id: str, homes: Homes) -> None:
        self._worker_id = worker_id
        self._homes = homes
        self._reasons: dict[str, int] = {}
        self._open = True

    def enter(self, adapter: str) -> None:
        """There is one more reason."""
        reasons = self._reasons.get(adapter, 0)
        self._reasons[adapter] = reasons + 1
        if not reasons and self._open:
            self._homes.add(adapter, self._worker_id)

    def leave(self, adapter: str) -> None:
        """There is one reason less. Raises KeyError when there was none."""
        self._reasons[adapter] -= 1
        if not self._reasons[adapter]:
            del self._reasons[adapter]
            if self._open:
                self._homes.remove(adapter, self._worker_id)

    def close(self) -> None:
        """The registration has ended: what it had does not count any more. Idempotent."""
        if self._open:
            self._open = False
            for adapter in self._reasons:
                self._homes.remove(adapter, self._worker_id)
