"""Which entries of a tier yield when bytes are short. Integers and a heap; the bytes are elsewhere.

    value = clock + uses * seconds to bring it back / bytes

GreedyDual-Size (Cao and Irani, USENIX ITS 1997) with frequency (Cherkasova, HPL-98-69): the entry of the least value
goes first and the clock moves to its value, so that what was dear once and is never used again grows old.
"""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


@dataclass(slots=True)
class _Entry:
    num_bytes: int
    seconds: float
    value: float
    uses: int = 1
    holds: int = 0


class ByteBudget(Generic[Key]):
    """Entries of known size under a limit. Running totals: no operation looks at all of them."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self._held_bytes = 0
        self._clock = 0.0
        self._entries: dict[Key, _Entry] = {}
        # (value, push number, key); an entry whose value has changed since is skipped
        self._heap: list[tuple[float, int, Key]] = []
        self._pushes = 0

    def __contains__(self, key: Key) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[Key]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, key: Key, num_bytes: int, seconds: float) -> None:
        """Books an entry; `seconds` is what bringing it back would take. The caller made room."""
        entry = _Entry(num_bytes, seconds, 0.0)
        self._entries[key] = entry
        self.used_bytes += num_bytes
        self._push(key, entry)

    def use(self, key: Key) -> None:
        """Somebody asked for the entry."""
        entry = self._entries[key]
        entry.uses += 1
        self._push(key, entry)

    def hold(self, key: Key) -> None:
        """Keeps the entry until as many releases."""
        entry = self._entries[key]
        if not entry.holds:
            self._held_bytes += entry.num_bytes
        entry.holds += 1

    def release(self, key: Key) -> None:
        entry = self._entries[key]
        entry.holds -= 1
        if not entry.holds:
            self._held_bytes -= entry.num_bytes
            self._push(key, entry)

    def remove(self, key: Key) -> None:
        entry = self._entries.pop(key)
        self.used_bytes -= entry.num_bytes
        if entry.holds:
            self._held_bytes -= entry.num_bytes

    def make_room(self, num_bytes: int) -> list[Key] | None:
        """Removes the least valuable entries until `num_bytes` fit, and says which.

        None, with nothing removed, when holds keep too much.
        """
        if self._held_bytes + num_bytes > self.limit_bytes:
            return None
        return self._evict_to(self.limit_bytes - num_bytes)

    def shrink(self, num_bytes: int) -> list[Key]:
        """Removes the least valuable entries until `num_bytes` are gone or only held ones are left."""
        return self._evict_to(max(self._held_bytes, self.used_bytes - num_bytes))

    def _evict_to(self, used_bytes: int) -> list[Key]:
        victims: list[Key] = []
        while self.used_bytes > used_bytes:
            value, _, key = heappop(self._heap)
            entry = self._entries.get(key)
            # A held one is pushed again when it is released.
            if entry is None or entry.value != value or entry.holds:
                continue
            self._clock = value
            self.remove(key)
            victims.append(key)
        return victims

    def _push(self, key: Key, entry: _Entry) -> None:
        entry.value = self._clock + entry.uses * entry.seconds / max(1, entry.num_bytes)
        self._pushes += 1
        heappush(self._heap, (entry.value, self._pushes, key))
        if len(self._heap) > 64 + 4 * len(self._entries):
            self._forget_stale()

    def _forget_stale(self) -> None:
        """Entries used often leave old values behind; the heap stays in proportion to what it orders."""
        self._heap = [
            (value, number, key)
            for value, number, key in self._heap
            if (entry := self._entries.get(key)) is not None and entry.value == value
        ]
        self._heap.sort()
