"""The face's copy of who is in which tier, and the operators that watch it change."""

import asyncio
from collections.abc import AsyncIterator, Iterable

from common.errors import LoraplexError
from loraplex.v1 import memory_pb2, scheduler_pb2, types_pb2

# A watcher that is further behind gets everything again instead: cheaper for both sides.
MAX_BEHIND = 10_000


class _Watcher:
    """What one watcher has not been sent yet."""

    def __init__(self) -> None:
        self.deltas: list[scheduler_pb2.ResidencyDelta] = []
        self.needs_snapshot = True
        self.error: LoraplexError | None = None
        self.wake = asyncio.Event()

    def add(self, deltas: Iterable[scheduler_pb2.ResidencyDelta]) -> None:
        if not self.needs_snapshot:
            self.deltas.extend(deltas)
        if len(self.deltas) > MAX_BEHIND:
            self.deltas.clear()
            self.needs_snapshot = True
        self.wake.set()


class ResidencyMirror:
    """Follows the changes that one engine reports, from its start on."""

    def __init__(self) -> None:
        self.sequence = 0
        self._adapters: dict[str, scheduler_pb2.ResidentAdapter] = {}
        self._watchers: set[_Watcher] = set()

    def is_here(self, adapter_version: str) -> bool:
        """The adapter is in pages or in the host tier."""
        return adapter_version in self._adapters

    def apply(self, deltas: Iterable[scheduler_pb2.ResidencyDelta]) -> None:
        """Changes in order; a pipe loses none."""
        deltas = list(deltas)
        if not deltas:
            return
        for delta in deltas:
            self.sequence = delta.sequence
            if delta.adapter.tier == types_pb2.TIER_STORE:
                self._adapters.pop(delta.adapter.adapter_version, None)
            else:
                self._adapters[delta.adapter.adapter_version] = delta.adapter
        for watcher in self._watchers:
            watcher.add(deltas)

    def lose_engine(self, error: LoraplexError) -> None:
        """Its pages are gone; the next engine counts from 1 again. Every watch ends with `error`."""
        self.sequence = 0
        self._adapters.clear()
        for watcher in self._watchers:
            watcher.error = error
            watcher.wake.set()

    async def watch(self) -> AsyncIterator[memory_pb2.WatchResidencyResponse]:
        """Everything, then every change. Raises the error of `lose_engine`."""
        watcher = _Watcher()
        self._watchers.add(watcher)
        try:
            while True:
                if watcher.error is not None:
                    raise watcher.error
                if watcher.needs_snapshot:
                    watcher.needs_snapshot = False
                    snapshot = list(self._adapters.values())
                    yield memory_pb2.WatchResidencyResponse(snapshot=snapshot, sequence=self.sequence)
                elif watcher.deltas:
                    deltas, watcher.deltas = watcher.deltas, []
                    yield memory_pb2.WatchResidencyResponse(deltas=deltas)
                else:
                    watcher.wake.clear()
                    await watcher.wake.wait()
        finally:
            self._watchers.discard(watcher)
