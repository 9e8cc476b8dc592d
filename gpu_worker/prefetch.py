"""Adapters on their way up before anybody can run with them: store → host → pages, in the order of the queue."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

from gpu_worker.batching import Batcher
from gpu_worker.memory.manager import MemoryManager

if TYPE_CHECKING:
    from gpu_worker.host_tier import HostTier

# Distinct adapters looked at from the head of the queue on: more would not be admitted before much else has changed.
LOOKAHEAD = 64
# Sequences looked at for them: many may want the same one.
MAX_LOOKED_AT = 4 * LOOKAHEAD
# Questions open at the face at once: twice what it fetches at a time, so that the order is still ours to choose.
MAX_ASKED = 8
# Share of the pool, as its divisor, that adapters may take which nobody runs with yet. The head of the queue is exempt.
AHEAD_DIVISOR = 4
MAX_HINTS = 1024


@dataclass(slots=True)
class Moves:
    """What to start now."""

    # (tenant, adapter version) the face is asked for
    asks: list[tuple[str, str]] = field(default_factory=list)
    # Adapters whose pages were reserved and must now be filled
    loads: list[str] = field(default_factory=list)


class Prefetcher:
    """Plans moves between steps; each is carried out on the side and waits for nobody.

    The queue's adapters come first and may take the pages of adapters that the queue does not want; hints (of the
    scheduler, of operators, of a restart) take free pages only.
    """

    def __init__(self, batcher: Batcher, memory: MemoryManager, host: "HostTier") -> None:
        self._batcher = batcher
        self._memory = memory
        self._host = host
        # adapter version -> tenant, oldest first
        self._hints: dict[str, str] = {}
        # Those of them the face was asked for
        self._asked: set[str] = set()
        # Wanted by requests that came since the last plan, and the pages reserved for them.
        self._early: set[str] = set()
        self._early_pages = 0

    @property
    def num_hints(self) -> int:
        """Hints that have not come to an end."""
        return len(self._hints)

    def hint(self, tenant: str, adapter_version: str) -> None:
        """The adapter will be asked for. A hint too many makes the oldest one void."""
        self._hints[adapter_version] = tenant
        if len(self._hints) > MAX_HINTS:
            self.forget(next(iter(self._hints)))

    def forget(self, adapter_version: str) -> None:
        """The hint has come to an end, or the adapter cannot be had."""
        self._hints.pop(adapter_version, None)
        self._asked.discard(adapter_version)

    def plan(self) -> Moves:
        """Reserves pages and says what to start. Looks at a bounded part of the queue."""
        moves = Moves()
        self._early.clear()
        self._early_pages = 0
        window = self._window()
        self._host.keep(window.keys())
        self._climb(window, moves)
        self._follow_hints(moves)
        return moves

    def early(self, adapter_versions: Iterable[str]) -> list[str]:
        """Reserves pages for the adapters of requests that came while a step computes, and says which to fill.

        They are not in line yet. Behind others in line they would have to wait for those: that is for `plan`.
        """
        loads, versions = [], list(adapter_versions)
        self._early.update(versions)
        for version in versions:
            layout = self._host.layout(version)
            if layout is None or self._batcher.num_waiting:
                continue
            need = self._memory.geometry.pages_for_bytes(layout.total_bytes)
            if self._early_pages + need > self._memory.num_pages // AHEAD_DIVISOR:
                continue
            if self._memory.prefetch(version, layout, keep=self._early, spare_pages=self._batcher.num_running):
                self._early_pages += need
                loads.append(version)
        return loads

    def _window(self) -> dict[str, str]:
        """Adapter version → tenant from the head of the queue on, as many as the host tier can hold together."""
        window: dict[str, str] = {}
        room = self._host.limit_bytes
        for sequence in islice(self._batcher.waiting(), MAX_LOOKED_AT):
            version = sequence.adapter_version
            if not version or version in window:
                continue
            if self._memory.adapters.get(version) is None:
                layout = self._host.layout(version)
                room -= layout.total_bytes if layout else sequence.adapter_bytes
            if room < 0 or len(window) == LOOKAHEAD:
                break
            window[version] = sequence.tenant
        return window

    def _climb(self, window: dict[str, str], moves: Moves) -> None:
        ahead, blocked = self._memory.num_pages // AHEAD_DIVISOR, False
        spare = self._batcher.num_running
        for position, (version, tenant) in enumerate(window.items()):
            layout = self._host.layout(version)
            resident = self._memory.adapters.get(version)
            if resident is not None:
                ahead -= 0 if resident.sequence_pins else len(resident.pages)
            elif layout is None:
                self._ask(tenant, version, moves)
            elif not blocked:
                need = self._memory.geometry.pages_for_bytes(layout.total_bytes)
                ahead -= need
                # In order: a small adapter further back must not take what a large one before it waits for.
                blocked = (position > 0 and ahead < 0) or not self._memory.prefetch(
                    version, layout, keep=window.keys(), spare_pages=spare
                )
                if not blocked:
                    moves.loads.append(version)

    def _follow_hints(self, moves: Moves) -> None:
        for version, tenant in list(self._hints.items()):
            layout = self._host.layout(version)
            if self._memory.adapters.get(version) is not None:
                self.forget(version)
            elif layout is not None:
                self.forget(version)
                if self._memory.prefetch(version, layout, spare_pages=self._batcher.num_running):
                    moves.loads.append(version)
            elif self._host.is_wanted(version):
                continue
            elif version in self._asked:
                # It came and found no room.
                self.forget(version)
            elif self._ask(tenant, version, moves):
                self._asked.add(version)
            else:
                return

    def _ask(self, tenant: str, version: str, moves: Moves) -> bool:
        """False when enough questions are open."""
        if self._host.num_wanted >= MAX_ASKED:
            return False
        if self._host.want(version):
            moves.asks.append((tenant, version))
        return True
