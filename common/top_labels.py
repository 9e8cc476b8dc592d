"""Bounded label values for unbounded sets of names: the busiest ones under their own name, the rest as `_other`."""

from collections import OrderedDict
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter

OTHER = "_other"
# Counts are halved after this many calls for each name that may be held, so that old traffic fades.
_CALLS_PER_NAME = 64
# A name takes the place of the least busy one only when it is this many times as busy: no two names alternate.
_HYSTERESIS = 2.0
# Names that are counted without being held, in parts of those that are.
_CANDIDATES_PER_NAME = 4


class TopLabels:
    """At most `limit` names; which ones follows the traffic.

    The algorithm is a bounded table of counts with decay, after Metwally, Agrawal, El Abbadi, "Efficient computation
    of frequent and top-k elements in data streams" (ICDT 2005), with hysteresis in place of inherited counts.
    """

    def __init__(self, limit: int, on_leave: Callable[[str], None] = lambda name: None) -> None:
        """`on_leave` is told each name that is folded from now on. `limit` is at least 1."""
        self._limit = limit
        self._on_leave = on_leave
        self._held: dict[str, float] = {}
        # least recently used first
        self._candidates: OrderedDict[str, float] = OrderedDict()
        self._calls = 0

    @property
    def names(self) -> list[str]:
        """Those that are themselves; on any thread."""
        return list(self._held)

    def fold(self, name: str) -> str:
        """The label value for one event of `name`: the name itself, or `_other`."""
        self._fade()
        if name in self._held:
            self._held[name] += 1
            return name
        if len(self._held) < self._limit:
            self._held[name] = 1.0
            return name
        count = self._candidates.pop(name, 0.0) + 1
        weakest = min(self._held, key=self._held.__getitem__)
        if count > _HYSTERESIS * self._held[weakest]:
            self._candidates[weakest] = self._held.pop(weakest)
            self._held[name] = count
            self._on_leave(weakest)
            return name
        self._candidates[name] = count
        if len(self._candidates) > _CANDIDATES_PER_NAME * self._limit:
            self._candidates.popitem(last=False)
        return OTHER

    def _fade(self) -> None:
        self._calls += 1
        if self._calls >= _CALLS_PER_NAME * self._limit:
            self._calls = 0
            for counts in (self._held, self._candidates):
                for name in counts:
                    counts[name] /= 2


class FoldedCounters:
    """Counters that share one folded label; a name that is folded takes its series along."""

    def __init__(self, label: str, limit: int, registry: CollectorRegistry, overflow: Counter) -> None:
        """`overflow` has the label `label` and counts the events under `_other`."""
        self._label = label
        self._registry = registry
        self._top = TopLabels(limit, self._leave)
        self._counters: list[Counter] = []
        self._overflow = overflow.labels(label)

    def add(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        """A counter whose labels are the folded one and `labels`."""
        counter = Counter(name, text, (self._label, *labels), registry=self._registry)
        self._counters.append(counter)
        return counter

    def fold(self, name: str) -> str:
        """The label value for one event of `name`. From one thread only."""
        folded = self._top.fold(name)
        if folded == OTHER:
            self._overflow.inc()
        return folded

    def _leave(self, name: str) -> None:
        for counter in self._counters:
            counter.remove_by_labels({self._label: name})


def overflow_counter(registry: CollectorRegistry) -> Counter:
    """The process's one count of events under `_other`."""
    text = "Events counted as _other because their label has too many names"
    return Counter("loraplex_label_overflow", text, ("label",), registry=registry)
