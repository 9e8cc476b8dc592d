"""Which adapters are in pages, as the engine's reports say, and which of them came back soon after they had left."""

from collections import OrderedDict
from collections.abc import Iterable

from loraplex.v1 import scheduler_pb2, types_pb2

# An adapter that is evicted and loaded again within this time was the wrong one to evict.
THRASH_SECONDS = 60.0


class Residency:
    """Adapters in pages by digest, and when the last ones left."""

    def __init__(self) -> None:
        self._resident: set[str] = set()
        # digest -> when it left, in seconds; oldest first
        self._left: OrderedDict[str, float] = OrderedDict()

    def __contains__(self, digest: str) -> bool:
        return digest in self._resident

    def __len__(self) -> int:
        return len(self._resident)

    def apply(self, changes: Iterable[scheduler_pb2.ResidencyDelta], now: float) -> int:
        """Takes in changes in order; how many adapters came back within THRASH_SECONDS. `now` is in seconds."""
        came_back = 0
        while self._left and now - next(iter(self._left.values())) >= THRASH_SECONDS:
            self._left.popitem(last=False)
        for change in changes:
            digest = change.adapter.adapter_version
            if change.adapter.tier == types_pb2.TIER_PAGES:
                self._resident.add(digest)
                came_back += self._left.pop(digest, None) is not None
            elif digest in self._resident:
                self._resident.remove(digest)
                self._left[digest] = now
        return came_back
