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

from gpu_worker.memory.allocator import IntegrityError, PageAllocator, PageKind
from gpu_worker.memory.costs import CostModel
from gpu_worker.memory.demand import Demand, Requests, ReturnChances, next_class_at, worth
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


_NOBODYS = Requests()
# A preempted sequence whom so many requests for its adapter overtook does not come back. The first age of a class.
_PATIENCE = 31


@dataclass(slots=True, eq=False)
class PrefixPage(Candidate):
    """A full page of KV that others may hold too."""

    key: bytes
    page: int
    parent: "PrefixPage | None"
    chances: ReturnChances
    # page tables that hold it
    references: int = 1
    # cached pages whose parent it is
    children: int = 0
    # Those for the adapter of whoever let go of it last, and how many there were then.
    requests: Requests = _NOBODYS
    released_at: int = 0
    # Whoever let go of it last was preempted and comes back.
    returning: bool = False
    # What it takes to compute it again with its adapter at hand.
    seconds: float = 0.0
    # Requests of its adapter after which it stands elsewhere in line; 0 = never.
    due_at: int = 0

    @property
    def num_pages(self) -> int:
        return 1

    @property
    def age(self) -> int:
        """Requests for its adapter since somebody let go of it."""
        return self.requests.admitted - self.released_at

    @property
    def worth(self) -> float:
        chance = 1.0 if self.returning and self.age < _PATIENCE else self.chances.of(self.age)
        return worth(self.requests.level, chance * (self.seconds + self.requests.reload_seconds_per_page))

    @property
    def exposed(self) -> bool:
        return not self.children


class PrefixCache:
    """Pages by key. Those in a page table are `kv`, the others `prefix` and in the eviction queue."""

    def __init__(
        self, allocator: PageAllocator, queue: EvictionQueue, costs: CostModel, demand: Demand, page_size: int
    ) -> None:
        self._allocator = allocator
        self._queue = queue
        self._costs = costs
        self._demand = demand
        self._page_size = page_size
        self._chances = ReturnChances()
        self._pages: dict[bytes, PrefixPage] = {}
        # (requests, how many of them) -> pages of the line that stand elsewhere then
        self._due: dict[tuple[Requests, int], dict[PrefixPage, None]] = {}

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
        published = PrefixPage(key, page, parent, self._chances)
        self._pages[key] = published
        if parent:
            parent.children += 1
        return published

    def acquire(self, page: PrefixPage) -> None:
        """One more table holds the page."""
        if not page.references:
            self._settle(page, returned=True)
            self._queue.discard(page)
            self._allocator.relabel([page.page], PageKind.KV)
        page.references += 1

    def release(
        self, pages: Sequence[PrefixPage], last_step: int, *, returning: bool, adapter_version: str = ""
    ) -> None:
        """A table lets go of its pages, computed with an adapter; launched step `last_step` may still touch them.

        `returning`: the sequence was preempted and will want them again.
        """
        seconds = self._costs.prefill_seconds_per_token * self._page_size
        requests = self._demand.of(adapter_version)
        for page in reversed(pages):
            page.references -= 1
            if page.references:
                continue
            page.last_step = last_step
            page.requests, page.released_at = requests, requests.admitted
            page.seconds, page.returning = seconds, returning
            self._allocator.relabel([page.page], PageKind.PREFIX)
            self._queue.add(page)
            self._expect(page)

    def passed(self, requests: Requests) -> None:
        """One more request for an adapter was admitted: the pages that it did not want are less likely to be wanted."""
        for page in self._due.pop((requests, requests.admitted), ()):
            self._queue.look_again(page)
            self._expect(page)

    def evict(self, page: PrefixPage) -> None:
        """Forgets an unreferenced page that has none behind it."""
        del self._pages[page.key]
        self._settle(page, returned=False)
        if parent := page.parent:
            parent.children -= 1
            if parent.exposed:
                self._queue.expose(parent)
                self._expect(parent)
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
        self._check_integrity_of_due()

    def _check_integrity_of_due(self) -> None:
        """Raises IntegrityError unless each page of the line, and no other, is looked at when its chance falls."""
        line = {page for page in self if page.exposed and not page.references}
        expected = {(page, page.released_at + later) for page in line if (later := next_class_at(page.age))}
        due = {(page, number) for (requests, number), pages in self._due.items() for page in pages}
        if due != expected or not all(self._due.values()):
            raise IntegrityError(f"{len(due)} pages are looked at again, {len(expected)} should be")
        if any(page.due_at for page in self if page.references):
            raise IntegrityError("a page in use is looked at again")

    def _expect(self, page: PrefixPage) -> None:
        """Notes when a page of the line is to be looked at again."""
        later = next_class_at(page.age) if page.exposed and not page.references else 0
        page.due_at = page.released_at + later if later else 0
        if page.due_at:
            self._due.setdefault((page.requests, page.due_at), {})[page] = None

    def _settle(self, page: PrefixPage, *, returned: bool) -> None:
        """An unreferenced page is wanted or goes: what became of it is learned."""
        # That a preempted sequence comes back says nothing of others.
        if not page.returning:
            self._chances.ended(page.age, returned=returned)
        if page.due_at:
            due = self._due[page.requests, page.due_at]
            del due[page]
            if not due:
                del self._due[page.requests, page.due_at]
            page.due_at = 0
