"""How long answers get: running quantiles of the outputs of each adapter."""

from bisect import bisect_right, insort
from collections import OrderedDict, deque

# Adapters that are remembered; the one that answered longest ago is forgotten first.
_MAX_ADAPTERS = 20_000


class OutputLengths:
    """The last `window` output lengths of each adapter, in tokens. An adapter is a task: its answers are alike."""

    def __init__(self, quantile: float, window: int, min_samples: int) -> None:
        """Fewer than `min_samples` answers say nothing."""
        self._quantile = quantile
        self._window = window
        self._min_samples = min_samples
        # Adapter -> lengths in order of arrival, and sorted.
        self._recent: OrderedDict[str, tuple[deque[int], list[int]]] = OrderedDict()

    def add(self, adapter: str, tokens: int) -> None:
        """One output of the adapter ended by itself after `tokens`. O(log window) and a short move."""
        recent = self._recent.get(adapter)
        if recent is None:
            recent = self._recent[adapter] = (deque(), [])
            if len(self._recent) > _MAX_ADAPTERS:
                self._recent.popitem(last=False)
        else:
            self._recent.move_to_end(adapter)
        arrivals, lengths = recent
        if len(arrivals) == self._window:
            del lengths[bisect_right(lengths, arrivals.popleft()) - 1]
        arrivals.append(tokens)
        insort(lengths, tokens)

    def expected(self, adapter: str, max_tokens: int, generated: int = 0) -> int:
        """Length of an output that has `generated` tokens and goes on; at most `max_tokens`.

        The quantile of those recent answers that were longer; `max_tokens` when there are too few to tell.
        """
        recent = self._recent.get(adapter)
        if recent is None or len(recent[1]) < self._min_samples:
            return max_tokens
        lengths = recent[1]
        first = bisect_right(lengths, generated)
        longer = len(lengths) - first
        if not longer:
            return max_tokens
        return min(max_tokens, lengths[first + min(longer - 1, int(self._quantile * longer))])
