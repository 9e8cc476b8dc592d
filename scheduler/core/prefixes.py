"""Which prompt beginnings a worker has computed lately."""

from collections import OrderedDict
from collections.abc import Sequence


class PrefixMemory:
    """The last pages of prompts that went to one worker, by the hash of each page and everything before it.

    The worker's cache may have evicted some: this is what to hope for, not what there is.
    """

    def __init__(self, max_pages: int) -> None:
        self._max_pages = max_pages
        self._pages: OrderedDict[int, None] = OrderedDict()

    def add(self, prefix: Sequence[int]) -> None:
        """A prompt with these pages went to the worker."""
        # The beginning is what others share: it is forgotten last.
        for page in reversed(prefix):
            self._pages[page] = None
            self._pages.move_to_end(page)
        while len(self._pages) > self._max_pages:
            self._pages.popitem(last=False)

    def num_pages(self, prefix: Sequence[int]) -> int:
        """Pages at the beginning of a prompt that are known here."""
        for index, page in enumerate(prefix):
            if page not in self._pages:
                return index
        return len(prefix)
