"""Full pages of KV by what they hold, so that a request with the same beginning does not compute it again.

A page's key is a sha256 over the key of the page before it and its own tokens; the first page's parent is a sha256
over the adapter's digest and the isolation salt. So equal keys mean equal adapter, salt, and tokens from the first one
on, and no name or local number is in it.

    computing --publish--> referenced (kv) --release--> unreferenced (prefix) --evict--> free
                               ^                            |
                               +---------acquire------------+

A table that holds a page holds all pages before it. So an unreferenced page has only unreferenced pages behind it, and
evicting those without any first (leaves first) leaves no page that nobody can reach.
"""

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import sqrt

from gpu_worker.memory.allocator import IntegrityError, PageAllocator, PageKind
from gpu_worker.memory.costs import CostModel
from gpu_worker.memory.eviction import Candidate, EvictionQueue


class PrefixKeys:
    """The keys of a sequence's full pages, in order, computed once each."""

    def __init__(self, adapter_version: str, isolation_salt: str, page_size: int) -> None:
        # The length keeps (adapter, salt) from being read in two ways.
        root = f"{len(adapter_version)}:{adapter_version}{isolation_salt}"
        self._parent = hashlib.sha256(root.encode()).digest()
        self._page_size = page_size
        self.keys: list[bytes] = []

    def extend(self, token_ids: Sequence[int]) -> None:
        """`token_ids` are those behind the pages that have keys; as many whole pages of them get theirs."""
        for start in range(0, len(token_ids) - self._page_size + 1, self._page_size):
            page = array("I", token_ids[start : start + self._page_size])
            self._parent = hashlib.sha256(self._parent + page.tobytes()).digest()
            self.keys.append(self._parent)


@dataclass(slots=True, eq=False)
class PrefixPage(Candidate):
    """A full page of KV that others may hold too."""

    key: bytes
    page: int
    parent: "PrefixPage | None"
    # page tables that hold it
    references: int = 1
    # cached pages whose parent it is
    children: int = 0
    # Of whoever let go of it last; empty for the base model.
    adapter_version: str = ""
    # Its place in line counts the reload of its adapter, which had left.
    carries_reload: bool = False

    @property
    def num_pages(self) -> int:
        return 1

    @property
    def expected_demand(self) -> float:
        """Hits so far promise fewer to come: a conversation ends, while an adapter's users stay."""
        return sqrt(self.demand)

    @property
    def exposed(self) -> bool:
        return not self.children


class PrefixCache:
    """Pages by key. Those in a page table are `kv`, the others `prefix` and in the eviction queue."""

    def __init__(self, allocator: PageAllocator, queue: EvictionQueue, costs: CostModel, page_size: int) -> None:
        self._allocator = allocator
        self._queue = queue
        self._costs = costs
        self._page_size = page_size
        self._pages: dict[bytes, PrefixPage] = {}

    def __iter__(self) -> Iterator[PrefixPage]:
        return iter(self._pages.values())

    def match(self, keys: Iterable[bytes]) -> list[PrefixPage]:
        """The cached pages of the longest beginning of `keys`."""
        found = []
        for key in keys:
            page = self._pages.get(key)
            if page is None:
                break
            found.append(page)
        return found

    def publish(self, key: bytes, page: int, parent: PrefixPage | None) -> PrefixPage:
        """A table's page is full and computed. Where another sequence was first the result is that one's page."""
        if twin := self._pages.get(key):
            self.acquire(twin)
            return twin
        published = PrefixPage(key, page, parent)
        self._pages[key] = published
        self._queue.wanted(published)
        if parent:
            parent.children += 1
        return published

    def acquire(self, page: PrefixPage) -> None:
        """One more table holds the page."""
        self._queue.wanted(page)
        if not page.references:
            self._queue.discard(page)
            self._allocator.relabel([page.page], PageKind.KV)
        page.references += 1

    def release(
        self, pages: Sequence[PrefixPage], last_step: int, *, returning: bool, adapter_version: str = ""
    ) -> None:
        """A table lets go of its pages, computed with an adapter; launched step `last_step` may still touch them.

        `returning`: the sequence was preempted and will want them again, which counts as demand.
        """
        seconds = self._costs.prefill_seconds_per_token * self._page_size
        for page in reversed(pages):
            page.references -= 1
            if returning:
                self._queue.wanted(page)
            if page.references:
                continue
            page.last_step = last_step
            page.adapter_version, page.carries_reload = adapter_version, False
            self._allocator.relabel([page.page], PageKind.PREFIX)
            self._queue.add(page, seconds)

    def evict(self, page: PrefixPage) -> None:
        """Forgets an unreferenced page that has none behind it."""
        del self._pages[page.key]
        if parent := page.parent:
            parent.children -= 1
            if parent.exposed:
                self._queue.expose(parent)
        self._allocator.free([page.page], page.last_step)

    def check_integrity(self, tables: Iterable[Sequence[PrefixPage]]) -> None:
        """Raises IntegrityError unless references, children and parents are those of `tables` and of the pages."""
        references = Counter(id(page) for table in tables for page in table)
        children = Counter(id(page.parent) for page in self)
        for page in self:
            if references[id(page)] != page.references:
                raise IntegrityError(f"page {page.page} is in {references[id(page)]} tables, booked: {page.references}")
            if children[id(page)] != page.children:
                raise IntegrityError(f"{children[id(page)]} pages are behind page {page.page}, booked: {page.children}")
            if page.parent and self._pages.get(page.parent.key) is not page.parent:
                raise IntegrityError(f"page {page.page} is behind one that is gone")
