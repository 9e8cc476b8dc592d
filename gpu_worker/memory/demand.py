"""How often each adapter is asked for, and how likely a request of it finds again what an earlier one left.

Chances are learned by age, as in N. Beckmann, H. Chen, A. Cidon, "LHD: Improving Cache Hit Rate by Maximizing Hit
Density" (NSDI 2018); an age here is a number of requests for the page's own adapter.
"""

from collections import OrderedDict
from math import inf, log2

# Demand halves while this many requests are admitted: long enough to see that an adapter of a few per mille is wanted.
HALF_LIFE_REQUESTS = 1024
# Adapters whose requests and load seconds are remembered: some 500 bytes each.
MAX_KNOWN_ADAPTERS = 65_536
# Ages 0, 1 to 2, 3 to 6, 7 to 14, ..., 511 and more.
AGE_CLASSES = 10
# What is known before anything was seen weighs as much as this many pages.
_PRIOR_PAGES = 8.0
# Requests seen in a class of ages beyond which the older half of them is forgotten.
_MAX_SEEN = 65_536.0


def worth(demand_level: float, seconds: float) -> float:
    """The logarithm of demand x seconds; a rank of the line of eviction."""
    return demand_level + log2(seconds) if seconds > 0 else -inf


class Requests:
    """Those for one adapter, or for the base model."""

    def __init__(self) -> None:
        # admitted so far: what ages are counted in
        self.admitted = 0
        # What it takes to bring the adapter back, shared out over its pages; 0 while it is here.
        self.reload_seconds_per_page = 0.0
        # A request that an adapter was prefetched for counts already.
        self.foreseen = False
        self._demand = 0.0
        self._counted_at = 0

    @property
    def level(self) -> float:
        """The logarithm of the demand, where all demands halve at the same time: one that is not asked for stands."""
        return log2(self._demand) + self._counted_at / HALF_LIFE_REQUESTS if self._demand > 0 else -inf

    def demand(self, clock: int) -> float:
        """Requests, older ones counting less."""
        return float(self._demand * 0.5 ** ((clock - self._counted_at) / HALF_LIFE_REQUESTS))

    def count(self, clock: int) -> None:
        self._demand = self.demand(clock) + 1.0
        self._counted_at = clock

    def withdraw(self) -> None:
        """Whoever was foreseen comes too late, and is counted then."""
        if self.foreseen:
            self.foreseen = False
            self._demand = max(0.0, self._demand - 1.0)


class Demand:
    """Requests by adapter; the empty name is the base model."""

    def __init__(self) -> None:
        # requests admitted
        self._clock = 0
        # asked for longest ago first
        self._requests: OrderedDict[str, Requests] = OrderedDict()

    def of(self, adapter_version: str) -> Requests:
        """Those of an adapter, none if it is not known."""
        found = self._requests.get(adapter_version)
        if found is None:
            found = self._requests[adapter_version] = Requests()
            if len(self._requests) > MAX_KNOWN_ADAPTERS:
                self._requests.popitem(last=False)
        return found

    def foresee(self, adapter_version: str) -> None:
        """A request for the adapter is on its way: it counts now, and not once more when it is admitted."""
        requests = self.of(adapter_version)
        requests.count(self._clock)
        requests.foreseen = True

    def admitted(self, adapter_version: str) -> Requests:
        """A request was admitted: what was wanted before counts a little less."""
        self._clock += 1
        requests = self.of(adapter_version)
        self._requests.move_to_end(adapter_version)
        if not requests.foreseen:
            requests.count(self._clock)
        requests.foreseen = False
        requests.admitted += 1
        return requests


class ReturnChances:
    """Of pages that somebody let go of: the share of requests for their adapter that wanted them, by age."""

    def __init__(self) -> None:
        # Half as likely in each class as in the one before, until something was seen.
        self._returned = [_PRIOR_PAGES * 0.5 ** (age_class + 1) for age_class in range(AGE_CLASSES)]
        self._seen = [_PRIOR_PAGES] * AGE_CLASSES

    def of(self, age: int) -> float:
        """The chance that the next request wants a page that `age` requests did not want."""
        age_class = _class_of(age)
        return self._returned[age_class] / self._seen[age_class]

    def ended(self, age: int, *, returned: bool) -> None:
        """After `age` requests that did not want it a page was wanted, or evicted."""
        last = _class_of(age)
        for age_class in range(last):
            self._seen[age_class] += 1 << age_class
        self._seen[last] += age - (1 << last) + 1 + returned
        self._returned[last] += returned
        if self._seen[last] > _MAX_SEEN:
            self._seen[last] /= 2
            self._returned[last] /= 2


def next_class_at(age: int) -> int:
    """The age from which on another chance holds; 0 when none does."""
    age_class = _class_of(age)
    return (2 << age_class) - 1 if age_class < AGE_CLASSES - 1 else 0


def _class_of(age: int) -> int:
    return min(AGE_CLASSES, (age + 1).bit_length()) - 1
