"""Page tables of the sequences that hold KV."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from gpu_worker.memory.allocator import PageAllocator, PageKind
from gpu_worker.memory.geometry import PageGeometry
from gpu_worker.memory.prefix_cache import PrefixCache, PrefixPage


@dataclass(slots=True)
class _Table:
    pages: list[int] = field(default_factory=list)
    # The cached pages that have the keys of the first ones: the same pages, or twins where another sequence was first.
    prefix: list[PrefixPage] = field(default_factory=list)

    def own_pages(self) -> list[int]:
        """Pages that are no other table's and not in the prefix cache."""
        twins = [page for page, cached in zip(self.pages, self.prefix, strict=False) if page != cached.page]
        return twins + self.pages[len(self.prefix) :]


class KVCache:
    """One page table a sequence; token `t` is in slot `table[t // page_size] * page_size + t % page_size`.

    Full pages are shared through the prefix cache. A page that is not full is not: its owner still writes to it.
    """

    def __init__(self, geometry: PageGeometry, allocator: PageAllocator, prefixes: PrefixCache) -> None:
        self._geometry = geometry
        self._allocator = allocator
        self._prefixes = prefixes
        self._tables: dict[str, _Table] = {}

    def page_table(self, sequence_id: str) -> Sequence[int]:
        """Pages in order. Entries never change while the sequence holds them; more are appended."""
        return self._tables[sequence_id].pages

    def own_pages(self) -> Iterator[int]:
        """Pages that belong to one table alone."""
        return (page for table in self._tables.values() for page in table.own_pages())

    def prefixes(self) -> Iterator[Sequence[PrefixPage]]:
        """What each table holds of the prefix cache."""
        return (table.prefix for table in self._tables.values())

    def start(self, sequence_id: str, cached: Sequence[PrefixPage]) -> None:
        """Opens a table that begins with cached pages."""
        for page in cached:
            self._prefixes.acquire(page)
        self._tables[sequence_id] = _Table([page.page for page in cached], list(cached))

    def room(self, sequence_id: str) -> int:
        """Tokens that the sequence's pages can hold."""
        return len(self._tables[sequence_id].pages) * self._geometry.page_size

    def extend(self, sequence_id: str, num_pages: int) -> None:
        """Appends pages. Raises OutOfPagesError, having taken none, when pages are short."""
        self._tables[sequence_id].pages += self._allocator.allocate(num_pages, PageKind.KV)

    def publish(self, sequence_id: str, keys: Sequence[bytes]) -> None:
        """The sequence's first pages, one for each key, are full and computed: others may begin with them."""
        table = self._tables[sequence_id]
        for index in range(len(table.prefix), len(keys)):
            parent = table.prefix[-1] if table.prefix else None
            table.prefix.append(self._prefixes.publish(keys[index], table.pages[index], parent))

    def release(self, sequence_id: str, last_step: int, *, returning: bool = False, adapter_version: str = "") -> None:
        """Frees the sequence's own pages and lets go of the cached ones; launched step `last_step` may touch them."""
        table = self._tables.pop(sequence_id)
        self._allocator.free(table.own_pages(), last_step)
        self._prefixes.release(table.prefix, last_step, returning=returning, adapter_version=adapter_version)
