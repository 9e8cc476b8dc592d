"""What the requests of one worker take of its sequences and pages, and whether another fits beside them."""

from collections.abc import Collection, Mapping

from scheduler.core.in_use import AdaptersInUse
from scheduler.core.model import Capacity, Key, Request, Residency
from scheduler.core.pages import peak_pages


class Room:
    """The requests that are present: those of the worker, except those that are rotated out."""

    def __init__(self, capacity: Capacity, residents: Mapping[str, Residency], adapter_pool_share: float) -> None:
        """`residents` are the adapters that the worker has, as it says itself; whoever keeps them changes them."""
        self.in_use = AdaptersInUse()
        self.num_sequences = 0
        self._capacity = capacity
        self._residents = residents
        self._share = adapter_pool_share
        self._present: dict[Key, Request] = {}
        # Pages when every sequence reaches its full context, and pages now.
        self._full_pages = 0
        self._held_pages = 0
        # (held, coming) of all sequences; None when it must be computed anew.
        self._profile: list[tuple[int, int]] | None = []
        # Sizes of the last request that did not fit; none of at least these sizes fits until something changes.
        self._misfit: tuple[int, int, int, int] | None = None

    # Who is present.

    def enter(self, request: Request, now: float) -> None:
        if request.adapter:
            self.in_use.enter(request.adapter, self.adapter_pages(request), now)
        self._present[request.key] = request
        self._count(request, 1)

    def leave(self, request: Request) -> None:
        """Raises KeyError when it was not present."""
        del self._present[request.key]
        if request.adapter:
            self.in_use.leave(request.adapter)
        self._count(request, -1)

    def moved(self, request: Request, held_pages_before: int) -> None:
        """A request that is present has computed or generated more, or is expected to generate other than before."""
        self._held_pages += self.held_pages(request) - held_pages_before
        self._profile = self._misfit = None

    # Sizes of a request, in pages.

    def adapter_pages(self, request: Request) -> int:
        """Of its adapter; what the worker says itself when the request does not know."""
        residency = self._residents.get(request.adapter)
        known = residency.num_pages if residency and not request.adapter_bytes else 0
        return known or self._capacity.adapter_pages(request.adapter_bytes)

    def full_pages(self, request: Request) -> int:
        """Of all its sequences at their full context, without its adapter."""
        return request.num_outputs * self._capacity.context_pages(request.context_tokens)

    def held_pages(self, request: Request) -> int:
        """Of all its sequences now, without its adapter."""
        return request.num_outputs * self._capacity.context_pages(request.held_tokens)

    # Whether it fits.

    def could_ever_fit(self, request: Request) -> bool:
        """When nothing else is there."""
        pages = self.adapter_pages(request) + self.full_pages(request)
        return pages <= self._capacity.num_pages and request.num_outputs <= self._capacity.max_sequences

    def fits(self, request: Request) -> bool:
        """Beside those that are present."""
        if self.num_sequences + request.num_outputs > self._capacity.max_sequences or not self.fits_adapter(request):
            return False
        adapters, pool = self.adapter_pages_with(request), self._capacity.num_pages
        if adapters + self._full_pages + self.full_pages(request) <= pool:
            return True
        if adapters + self._held_pages + self.held_pages(request) > pool:
            return False
        sizes = (adapters, request.num_outputs, request.held_tokens, request.coming_tokens)
        if self._misfit and all(size >= limit for size, limit in zip(sizes, self._misfit, strict=True)):
            return False
        fits = self.peak_pages_with(request) <= pool
        if not fits:
            self._misfit = sizes
        return fits

    def fits_without(self, request: Request, away: Collection[Key]) -> bool:
        """When those in `away` have made room; adapters count as if they had not."""
        staying = [there for key, there in self._present.items() if key not in away]
        sequences = [pair for there in (*staying, request) for pair in _sequences(there)]
        if len(sequences) > self._capacity.max_sequences:
            return False
        pages = self.adapter_pages_with(request) + peak_pages(sequences, self._capacity.page_size)
        return pages <= self._capacity.num_pages

    def fits_adapter(self, request: Request) -> bool:
        """Whether its adapter may join those in use: beyond their share of the pool they would push each other, and
        the KV, out of it."""
        if not request.adapter or request.adapter in self.in_use or not self.in_use.names:
            return True
        return self.excess_adapter_pages(request) <= 0

    def may_be_crowded(self, largest_adapter_bytes: int) -> bool:
        """Whether adapters in use may keep one of at most so many bytes out."""
        pages = self.in_use.num_pages + self._capacity.adapter_pages(largest_adapter_bytes)
        return pages > self._share * self._capacity.num_pages

    def excess_adapter_pages(self, request: Request) -> float:
        """Pages that adapters in use and the request's would have beyond their share of the pool."""
        return self.adapter_pages_with(request) - self._share * self._capacity.num_pages

    def adapter_pages_with(self, request: Request) -> int:
        """Pages of the adapters in use and the request's."""
        needs_more = request.adapter and request.adapter not in self.in_use
        return self.in_use.num_pages + (self.adapter_pages(request) if needs_more else 0)

    def peak_pages_with(self, request: Request) -> int:
        """Estimated pages at the peak of those that are present, and this one."""
        if self._profile is None:
            self._profile = [pair for there in self._present.values() for pair in _sequences(there)]
        sequences = [*self._profile, *_sequences(request)]
        return self.adapter_pages_with(request) + peak_pages(sequences, self._capacity.page_size)

    def _count(self, request: Request, sign: int) -> None:
        self.num_sequences += sign * request.num_outputs
        self._full_pages += sign * self.full_pages(request)
        self._held_pages += sign * self.held_pages(request)
        self._profile = self._misfit = None


def _sequences(request: Request) -> list[tuple[int, int]]:
    """(tokens held, tokens coming) of each of its outputs."""
    return [(request.held_tokens, request.coming_tokens)] * request.num_outputs
