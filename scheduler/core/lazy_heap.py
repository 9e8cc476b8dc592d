"""A heap of names whose keys change while they are in it."""

import heapq
from collections.abc import Callable
from typing import Generic, TypeVar

Place = tuple[float, ...]
_Name = TypeVar("_Name", str, tuple[str, str])

# Entries that a smaller one of the same name has made void are swept out when there are more than these.
_SPARE_ENTRIES = 64


class LazyHeap(Generic[_Name]):
    """Names by the key they have now, smallest first; equal keys by name. Everything is O(log n), amortised.

    `key` says a name's key, or None once it does not belong here. A key that has grown, and a name that is gone, are
    noticed when they reach the top. A key that has fallen must be pushed again.
    """

    def __init__(self, key: Callable[[_Name], Place | None]) -> None:
        self._key: Callable[[_Name], Place | None] = key
        self._heap: list[tuple[Place, _Name]] = []
        # Name -> the key of its entry; other entries of the name are void.
        self._entries: dict[_Name, Place] = {}

    def push(self, name: _Name) -> None:
        """The name is here, or its key has fallen."""
        key = self._key(name)
        if key is None:
            return
        known = self._entries.get(name)
        if known is None or key < known:
            self._entries[name] = key
            heapq.heappush(self._heap, (key, name))
            if len(self._heap) > 2 * len(self._entries) + _SPARE_ENTRIES:
                self._heap = [(key, name) for name, key in self._entries.items()]
                heapq.heapify(self._heap)

    def pop(self, name: _Name) -> None:
        """Takes the name out until it is pushed again."""
        self._entries.pop(name, None)

    def top(self) -> _Name | None:
        """The name with the smallest key, which stays; None when there is none."""
        while self._heap:
            key, name = self._heap[0]
            if self._entries.get(name) != key:
                heapq.heappop(self._heap)
                continue
            current = self._key(name)
            if current == key:
                return name
            if current is None:
                heapq.heappop(self._heap)
                del self._entries[name]
            else:
                heapq.heapreplace(self._heap, (current, name))
                self._entries[name] = current
        return None
