"""Which page belongs to whom, in plain integers.

    free --allocate--> kv | loading --relabel--> adapter
      ^                 |                          |
      +---complete(step)-- quarantined <--free-----+

A freed page carries the number of the last launched step that may still touch it, and is free again only when that step
has completed: with overlapped steps, an adapter copied into a page that a running kernel still writes would be silent
corruption.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum


class PageKind(IntEnum):
    """What a page holds."""

    FREE = 0
    QUARANTINED = 1
    LOADING = 2
    KV = 3
    PREFIX = 4
    ADAPTER = 5


class OutOfPagesError(Exception):
    """Fewer free pages than asked for; nothing was taken."""


class IntegrityError(AssertionError):
    """The books do not balance: a page has two owners, none, or the wrong kind."""


@dataclass(frozen=True, slots=True)
class PageCounts:
    """Pages of each kind; they add up to `total`."""

    total: int
    free: int
    quarantined: int
    loading: int
    kv: int
    prefix: int
    adapters: int


class PageAllocator:
    """One free list. Every operation is all-or-nothing and O(pages it names)."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        # A stack: the page freed last is given out first, while it is warm in a cache.
        self._free = list(range(num_pages - 1, -1, -1))
        self._kinds = [PageKind.FREE] * num_pages
        # pages of each kind, by PageKind
        self._tally = [0] * len(PageKind)
        self._tally[PageKind.FREE] = num_pages
        # (step, pages), steps not falling
        self._quarantine: deque[tuple[int, list[int]]] = deque()
        self.completed_step = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, num_pages: int, kind: PageKind) -> list[int]:
        """Takes `num_pages` pages. Raises OutOfPagesError, having taken none, when fewer are free."""
        if num_pages > len(self._free):
            raise OutOfPagesError(f"{num_pages} pages asked for, {len(self._free)} free")
        split = len(self._free) - num_pages
        pages = self._free[split:]
        del self._free[split:]
        self.relabel(pages, kind)
        return pages

    def relabel(self, pages: Iterable[int], kind: PageKind) -> None:
        """Changes what pages hold, for instance from loading to adapter."""
        for page in pages:
            self._tally[self._kinds[page]] -= 1
            self._tally[kind] += 1
            self._kinds[page] = kind

    def free(self, pages: Sequence[int], last_step: int) -> None:
        """Gives pages back; those that launched step `last_step` may touch wait until it has completed."""
        if last_step <= self.completed_step:
            self._release(pages)
            return
        self.relabel(pages, PageKind.QUARANTINED)
        self._quarantine.append((last_step, list(pages)))

    def complete(self, step: int) -> None:
        """Step `step` and all before it have completed: their quarantined pages are free."""
        self.completed_step = step
        waiting: deque[tuple[int, list[int]]] = deque()
        for last_step, pages in self._quarantine:
            if last_step <= step:
                self._release(pages)
            else:
                waiting.append((last_step, pages))
        self._quarantine = waiting

    def _release(self, pages: Sequence[int]) -> None:
        self.relabel(pages, PageKind.FREE)
        self._free.extend(pages)

    def counts(self) -> PageCounts:
        tally = self._tally
        return PageCounts(
            total=self.num_pages,
            free=tally[PageKind.FREE],
            quarantined=tally[PageKind.QUARANTINED],
            loading=tally[PageKind.LOADING],
            kv=tally[PageKind.KV],
            prefix=tally[PageKind.PREFIX],
            adapters=tally[PageKind.ADAPTER],
        )

    def check_integrity(self, owned: Iterable[tuple[PageKind, Sequence[int]]]) -> None:
        """Raises IntegrityError unless free + quarantined + `owned` is every page exactly once, each of its kind."""
        quarantined = [(PageKind.QUARANTINED, pages) for _, pages in self._quarantine]
        owners = [0] * self.num_pages
        for kind, pages in [(PageKind.FREE, self._free), *quarantined, *owned]:
            for page in pages:
                owners[page] += 1
                if self._kinds[page] is not kind:
                    raise IntegrityError(f"page {page} is {self._kinds[page].name}, its owner says {kind.name}")
        for page, count in enumerate(owners):
            if count != 1:
                raise IntegrityError(f"page {page} ({self._kinds[page].name}) has {count} owners")
        for kind in PageKind:
            if self._tally[kind] != self._kinds.count(kind):
                raise IntegrityError(f"{self._tally[kind]} pages tallied as {kind.name}, {self._kinds.count(kind)} are")
