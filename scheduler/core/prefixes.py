"""Which prompt beginnings a worker has computed lately."""

from collections import OrderedDict
from collections.abc import Sequence


class PrefixMemory:
    """The last beginnings of prompts that went to one worker, by the hashes that the gateways sent.

    The worker's cache may have evicted some: this is what to hope for, not what there is.
    """

    def __init__(self, max_hashes: int) -> None:
        self._max_hashes = max_hashes
        self._hashes: OrderedDict[int, None] = OrderedDict()

    def add(self, prefix: Sequence[int]) -> None:
        """A prompt with these beginnings went to the worker."""
        # The shortest is what others share: it is forgotten last.
        for beginning in reversed(prefix):
            self._hashes[beginning] = None
            self._hashes.move_to_end(beginning)
        while len(self._hashes) > self._max_hashes:
            self._hashes.popitem(last=False)

    def num_known(self, prefix: Sequence[int]) -> int:
        """How many of the hashes, from the shortest beginning on, are known here."""
        for index, beginning in enumerate(prefix):
            if beginning not in self._hashes:
                return index
        return len(prefix)
