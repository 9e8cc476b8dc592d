"""Page tables of the sequences that hold KV."""

from collections.abc import Iterator, Sequence

from gpu_worker.memory.allocator import PageAllocator, PageKind
from gpu_worker.memory.geometry import PageGeometry


class KVCache:
    """One page table a sequence; token `t` is in slot `table[t // page_size] * page_size + t % page_size`."""

    def __init__(self, geometry: PageGeometry, allocator: PageAllocator) -> None:
        self._geometry = geometry
        self._allocator = allocator
        self._tables: dict[str, list[int]] = {}

    def __contains__(self, sequence_id: str) -> bool:
        return sequence_id in self._tables

    def page_table(self, sequence_id: str) -> Sequence[int]:
        return self._tables[sequence_id]

    def tables(self) -> Iterator[Sequence[int]]:
        return iter(self._tables.values())

    def missing_pages(self, sequence_id: str, num_tokens: int) -> int:
        """Pages still needed to hold `num_tokens` of the sequence."""
        held = len(self._tables.get(sequence_id, ()))
        return max(0, self._geometry.pages_for_tokens(num_tokens) - held)

    def extend(self, sequence_id: str, num_tokens: int) -> None:
        """Makes room for `num_tokens` in all. Raises OutOfPagesError, having taken none, when pages are short."""
        pages = self._allocator.allocate(self.missing_pages(sequence_id, num_tokens), PageKind.KV)
        self._tables.setdefault(sequence_id, []).extend(pages)

    def release(self, sequence_id: str, last_step: int) -> None:
        """Frees every page of the sequence; `last_step` is the last launched step that may touch them."""
        self._allocator.free(self._tables.pop(sequence_id), last_step)
