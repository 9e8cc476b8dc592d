"""Page tables of the sequences that hold KV."""

from collections import Counter
from collections.abc import Iterator, Sequence

from gpu_worker.memory.allocator import IntegrityError, PageAllocator, PageKind
from gpu_worker.memory.geometry import PageGeometry


class KVCache:
    """One page table a sequence; token `t` is in slot `table[t // page_size] * page_size + t % page_size`.

    Outputs of one prompt share its full pages: such a page is freed when the last of them lets go.
    """

    def __init__(self, geometry: PageGeometry, allocator: PageAllocator) -> None:
        self._geometry = geometry
        self._allocator = allocator
        self._tables: dict[str, list[int]] = {}
        # page -> tables that hold it, for pages in more than one
        self._shared: Counter[int] = Counter()

    def __contains__(self, sequence_id: str) -> bool:
        return sequence_id in self._tables

    def page_table(self, sequence_id: str) -> Sequence[int]:
        return self._tables[sequence_id]

    def owned_pages(self) -> Iterator[int]:
        """Every page that holds KV, once."""
        return iter({page for table in self._tables.values() for page in table})

    def share(self, source_id: str, sequence_id: str, num_tokens: int) -> int:
        """Starts a table with the full pages of the first `num_tokens` of another; returns the tokens they hold.

        Those tokens must have been computed. A page that is not full is not shared: its owner still writes to it.
        """
        pages = self._tables[source_id][: num_tokens // self._geometry.page_size]
        for page in pages:
            self._shared[page] = max(2, self._shared[page] + 1)
        self._tables[sequence_id] = list(pages)
        return len(pages) * self._geometry.page_size

    def check_integrity(self) -> None:
        """Raises IntegrityError when a page is in more tables than it is shared by."""
        holders = Counter(page for table in self._tables.values() for page in table)
        for page, count in holders.items():
            if count != self._shared.get(page, 1):
                raise IntegrityError(f"page {page} is in {count} tables, {self._shared.get(page, 1)} are booked")

    def missing_pages(self, sequence_id: str, num_tokens: int) -> int:
        """Pages still needed to hold `num_tokens` of the sequence."""
        held = len(self._tables.get(sequence_id, ()))
        return max(0, self._geometry.pages_for_tokens(num_tokens) - held)

    def extend(self, sequence_id: str, num_tokens: int) -> None:
        """Makes room for `num_tokens` in all. Raises OutOfPagesError, having taken none, when pages are short."""
        pages = self._allocator.allocate(self.missing_pages(sequence_id, num_tokens), PageKind.KV)
        self._tables.setdefault(sequence_id, []).extend(pages)

    def release(self, sequence_id: str, last_step: int) -> None:
        """Frees the sequence's pages that no other shares; launched step `last_step` may still touch them."""
        freed = []
        for page in self._tables.pop(sequence_id):
            if page not in self._shared:
                freed.append(page)
                continue
            self._shared[page] -= 1
            if self._shared[page] == 1:
                del self._shared[page]
        self._allocator.free(freed, last_step)
