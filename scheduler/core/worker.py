"""One registered worker as the core sees it: what it has, what it was given, and what it could still take."""

import math
from collections.abc import Iterable

from scheduler.core.commands import Action, Command, Preempt
from scheduler.core.costs import CostModel, FactSum
from scheduler.core.homes import Home
from scheduler.core.in_use import AdaptersInUse
from scheduler.core.lines import Line
from scheduler.core.model import Capacity, Hello, Key, Progress, Request, RequestState, Residency, Tier
from scheduler.core.pages import peak_pages
from scheduler.core.prefixes import PrefixMemory
from scheduler.core.settings import Settings

# Adapters that are remembered to have been prefetched.
_MAX_PREFETCHED = 1024


class Worker:
    """Requests, adapters and commands of one worker, from one registration to its end."""

    def __init__(self, hello: Hello, epoch: int, settings: Settings, line: Line, home: Home) -> None:
        """`epoch` is that of the commands of this registration; `line` will hold what waits for it, `home` its
        adapters."""
        self.worker_id = hello.worker_id
        self.capacity: Capacity = hello.capacity
        self.identity = hello.identity
        self.epoch = epoch
        self.line = line
        self.home = home
        self.draining = False
        # When it must be looked at though nothing happens; None when only an event can change anything.
        self.wake_at: float | None = None
        # What had come to its line and left it when its adapters were last prefetched.
        self.prefetched_at = (0, 0)
        self.costs = CostModel()
        self.facts = FactSum()
        # The limit of its steps as it was last told; None before.
        self.step_budget: int | None = None
        self.requests: dict[Key, Request] = {}
        self.residents: dict[str, Residency] = {}
        self.num_running = 0
        self.applied_seq = 0
        # Attempts that it had when it registered and was told to end, another worker having them.
        self.disowned: set[Key] = set()
        self.outstanding_tokens = 0
        # Tokens ever given to it: evens out workers that are equally idle.
        self.given_tokens = 0
        self._settings = settings
        self._seq = 0
        # Commands that it was not sent yet.
        self.outbox: list[Command] = []
        self._residency_sequence: int | None = None
        # By its requests, those that are rotated out excepted.
        self.in_use = AdaptersInUse()
        # Requests that were told to give their pages back in favour of another adapter, and have not run since; each
        # with the number of that command.
        self.rotated: dict[Key, int] = {}
        # Adapters it was told to bring to host memory.
        self._prefetched: dict[str, None] = {}
        self._prefixes = PrefixMemory(settings.max_prefix_hashes)
        self._num_sequences = 0
        # Requests that were told to give their pages back in favour of another tenant, and have not run since; each
        # with the number of that command. They count as present: what ends is followed by them, not by others.
        self.displaced: dict[Key, int] = {}
        # Tenant -> its sequences, those of requests that are rotated out excepted.
        self.tenants: dict[str, int] = {}
        # When a request was last preempted for a tenant below its share.
        self.preempted_at = -math.inf
        # Pages when every sequence reaches its full context, and pages now.
        self._full_pages = 0
        self._held_pages = 0
        # (held, coming) of all sequences; None when it must be computed anew.
        self._profile: list[tuple[int, int]] | None = []
        # Sizes of the last request that did not fit; none of at least these sizes fits until something changes.
        self._misfit: tuple[int, int, int, int] | None = None
        for residency in hello.resident:
            self._move(residency)

    @property
    def last_seq(self) -> int:
        """Number of the last command."""
        return self._seq

    @property
    def num_waiting(self) -> int:
        """Requests in its local queue."""
        return len(self.requests) - self.num_running

    @property
    def full(self) -> bool:
        """It can be given nothing, however small."""
        return (
            self.draining
            or self._num_sequences >= self.capacity.max_sequences
            or self.num_waiting >= self._settings.max_waiting_requests
        )

    def has(self, adapter: str) -> bool:
        """Nothing, or only a copy from host memory, is needed before it can run the adapter."""
        known = adapter in self.in_use or adapter in self._prefetched
        return known or self.tier(adapter) is not Tier.STORE

    def cached_tokens(self, request: Request) -> int:
        """Tokens at the beginning of its prompt that were computed here a while ago and may still be cached."""
        return self._prefixes.num_known(request.prefix) * request.prefix_chunk_tokens if request.prefix else 0

    def remember_prefix(self, request: Request) -> None:
        self._prefixes.add(request.prefix)

    def note_prefetch(self, adapter: str) -> bool:
        """It is told to fetch the adapter; False when it was, or has it already."""
        if adapter in self._prefetched or self.has(adapter):
            return False
        self._prefetched[adapter] = None
        self.home.enter(adapter)
        if len(self._prefetched) > _MAX_PREFETCHED:
            oldest = next(iter(self._prefetched))
            del self._prefetched[oldest]
            self.home.leave(oldest)
        return True

    def tier(self, adapter: str) -> Tier:
        residency = self.residents.get(adapter)
        return residency.tier if residency else Tier.STORE

    def uses(self, adapter: str) -> bool:
        """One of its requests needs the adapter."""
        return adapter in self.in_use

    def will_use(self, adapter: str) -> bool:
        """One of its requests needs the adapter, or one that waits for it."""
        return adapter in self.in_use or self.line.has(adapter)

    def burden_tokens(self, adapter_pages: int) -> float:
        """What one more adapter of so many pages costs in each step, counted once for everybody whom it delays: tokens
        that could be generated in that time. The model of a step knows adapters as large as those in use."""
        used = self.in_use.num_pages
        size = adapter_pages * len(self.in_use.names) / used if used else 1.0
        return self.costs.adapter_tokens * size * (self.num_running + 1)

    def adapter_pages(self, request: Request) -> int:
        """Pages of the request's adapter; what the worker says itself when the request does not know."""
        residency = self.residents.get(request.adapter)
        known = residency.num_pages if residency and not request.adapter_bytes else 0
        return known or self.capacity.adapter_pages(request.adapter_bytes)

    def full_pages(self, request: Request) -> int:
        """Pages of all its sequences at their full context, without its adapter."""
        return request.num_outputs * self.capacity.context_pages(request.context_tokens)

    def could_ever_take(self, request: Request) -> bool:
        """Whether the request fits when nothing else is there."""
        pages = self.adapter_pages(request) + self.full_pages(request)
        return pages <= self.capacity.num_pages and request.num_outputs <= self.capacity.max_sequences

    def has_room_for_adapter(self, request: Request) -> bool:
        """Whether the request's adapter may join those in use: beyond their share of the pool they would push each
        other, and the KV, out of it."""
        if not request.adapter or request.adapter in self.in_use or not self.in_use.names:
            return True
        return self.excess_adapter_pages(request) <= 0

    def may_be_crowded(self) -> bool:
        """Whether adapters in use may keep one of its line out."""
        pages = self.in_use.num_pages + self.capacity.adapter_pages(self.line.largest_adapter_bytes)
        return pages > self._settings.adapter_pool_share * self.capacity.num_pages

    def excess_adapter_pages(self, request: Request) -> float:
        """Pages that adapters in use and the request's would have beyond their share of the pool."""
        share = self._settings.adapter_pool_share * self.capacity.num_pages
        return self._pages_of_adapters_with(request) - share

    def can_take(self, request: Request) -> bool:
        """Whether it may be given the request now."""
        if self.full or self._num_sequences + request.num_outputs > self.capacity.max_sequences:
            return False
        if not self.has_room_for_adapter(request):
            return False
        adapters, pool = self._pages_of_adapters_with(request), self.capacity.num_pages
        if adapters + self._full_pages + self.full_pages(request) <= pool:
            return True
        if adapters + self._held_pages + self._pages_held(request) > pool:
            return False
        sizes = (adapters, request.num_outputs, request.held_tokens, request.coming_tokens)
        if self._misfit and all(size >= limit for size, limit in zip(sizes, self._misfit, strict=True)):
            return False
        fits = self.peak_pages_with(request) <= pool
        if not fits:
            self._misfit = sizes
        return fits

    def fits_instead_of(self, request: Request, other: Request) -> bool:
        """Whether it has room for the request when the other one, and those displaced before, have made theirs."""
        away = {other.key, *self.displaced, *self.rotated}
        present = [there for key, there in self.requests.items() if key not in away]
        sequences = [pair for there in (*present, request) for pair in _sequences(there)]
        if self.draining or self.num_waiting + 1 >= self._settings.max_waiting_requests:
            return False
        if len(sequences) > self.capacity.max_sequences:
            return False
        pages = self._pages_of_adapters_with(request) + peak_pages(sequences, self.capacity.page_size)
        return pages <= self.capacity.num_pages

    def peak_pages_with(self, request: Request) -> int:
        """Estimated pages at the peak of its requests, those rotated out excepted, and this one."""
        if self._profile is None:
            present = [other for key, other in self.requests.items() if key not in self.rotated]
            self._profile = [pair for other in present for pair in _sequences(other)]
        sequences = [*self._profile, *_sequences(request)]
        return self._pages_of_adapters_with(request) + peak_pages(sequences, self.capacity.page_size)

    def obstacle(self, request: Request) -> str:
        """Why it cannot be given the request now, with the limit and the value; empty when it can."""
        capacity, sequences = self.capacity, self._num_sequences + request.num_outputs
        if self.draining:
            return "it is draining"
        if not self.could_ever_take(request):
            return "its pool is too small"
        if sequences > capacity.max_sequences:
            return f"it would have {sequences} sequences and its limit is {capacity.max_sequences}"
        if self.num_waiting >= self._settings.max_waiting_requests:
            return f"{self.num_waiting} requests wait there and the limit is {self._settings.max_waiting_requests}"
        if not self.has_room_for_adapter(request):
            pages, share = self._pages_of_adapters_with(request), self._settings.adapter_pool_share
            return (
                f"adapters in use would need {pages} pages and may have {share:g} of the pool's "
                f"{capacity.num_pages}; they take turns"
            )
        if not self.can_take(request):
            peak = self.peak_pages_with(request)
            return f"its requests would need {peak} pages at their peak and its pool has {capacity.num_pages}"
        return ""

    def add(self, request: Request, now: float) -> None:
        """The request is on the worker from now on."""
        request.worker_id = self.worker_id
        self.requests[request.key] = request
        self.given_tokens += request.remaining_tokens
        self.outstanding_tokens += request.remaining_tokens
        self.num_running += request.state is RequestState.RUNNING
        self._enter(request, now)

    def remove(self, request: Request) -> None:
        """The request has left the worker. Raises KeyError when it was not there."""
        del self.requests[request.key]
        self.outstanding_tokens -= request.remaining_tokens
        self.num_running -= request.state is RequestState.RUNNING
        if self.rotated.pop(request.key, None) is None:
            self._exit(request)
        self.displaced.pop(request.key, None)
        request.worker_id = ""

    def displace(self, request: Request) -> None:
        """Tells it to give the request's pages back in favour of a tenant below its share."""
        self.displaced[request.key] = self.command(Preempt(request.key))

    def rotate_out(self, request: Request) -> None:
        """Tells it to give the request's pages back: what it used is for others until it runs again."""
        self._exit(request)
        self.rotated[request.key] = self.command(Preempt(request.key))

    def advance(self, request: Request, progress: Progress, expected_tokens: int, now: float) -> bool:
        """Takes in what the request does and how far it is; False when that is nothing new."""
        assert isinstance(progress.state, RequestState)
        computed_tokens = max(progress.computed_tokens, request.computed_tokens)
        generated_tokens = max(progress.generated_tokens, request.generated_tokens)
        told = (progress.state, computed_tokens, generated_tokens)
        if told == (request.state, request.computed_tokens, request.generated_tokens):
            return False
        self.outstanding_tokens -= request.remaining_tokens
        self.num_running -= request.state is RequestState.RUNNING
        held_pages = self._pages_held(request)
        request.state, request.computed_tokens, request.generated_tokens = told
        request.expected_tokens = expected_tokens
        self.outstanding_tokens += request.remaining_tokens
        self.num_running += request.state is RequestState.RUNNING
        if request.state is RequestState.RUNNING and self.applied_seq >= self.displaced.get(request.key, math.inf):
            del self.displaced[request.key]
        preempt_seq = self.rotated.get(request.key)
        if preempt_seq is None:
            self._held_pages += self._pages_held(request) - held_pages
            self._profile = self._misfit = None
        elif request.state is RequestState.RUNNING and self.applied_seq >= preempt_seq:
            del self.rotated[request.key]
            self._enter(request, now)
        return True

    def _enter(self, request: Request, now: float) -> None:
        if request.adapter:
            if request.adapter not in self.in_use:
                self.home.enter(request.adapter)
            self.in_use.enter(request.adapter, self.adapter_pages(request), now)
        self._count(request, 1)

    def _exit(self, request: Request) -> None:
        if request.adapter:
            self.in_use.leave(request.adapter)
            if request.adapter not in self.in_use:
                self.home.leave(request.adapter)
        self._count(request, -1)

    def command(self, action: Action) -> int:
        """Queues a command and returns its number."""
        self._seq += 1
        self.outbox.append(Command(self._seq, action))
        return self._seq

    def take_commands(self) -> list[Command]:
        """The commands since the last call."""
        commands, self.outbox = self.outbox, []
        return commands

    def acknowledge(self, epoch: int, applied_seq: int) -> None:
        """Takes in the last applied command; numbers of other epochs, of the past or never given are ignored."""
        if epoch == self.epoch and self.applied_seq < applied_seq <= self._seq:
            self.applied_seq = applied_seq

    def move_adapters(self, changes: Iterable[Residency]) -> bool:
        """Takes in changes of tier in order; those seen before are ignored. False when one is missing."""
        for change in changes:
            last = self._residency_sequence
            if last is not None and change.sequence <= last:
                continue
            if last is not None and change.sequence != last + 1:
                return False
            self._residency_sequence = change.sequence
            self._move(change)
        return True

    def _move(self, change: Residency) -> None:
        before = self.residents.pop(change.adapter, None)
        if change.tier is not Tier.STORE:
            self.residents[change.adapter] = change
            if before is None:
                self.home.enter(change.adapter)
        elif before is not None:
            self.home.leave(change.adapter)

    def _count(self, request: Request, sign: int) -> None:
        self._num_sequences += sign * request.num_outputs
        self.tenants[request.tenant] = self.tenants.get(request.tenant, 0) + sign * request.num_outputs
        if not self.tenants[request.tenant]:
            del self.tenants[request.tenant]
        self._full_pages += sign * self.full_pages(request)
        self._held_pages += sign * self._pages_held(request)
        self._profile = self._misfit = None

    def _pages_held(self, request: Request) -> int:
        return request.num_outputs * self.capacity.context_pages(request.held_tokens)

    def _pages_of_adapters_with(self, request: Request) -> int:
        needs_more = request.adapter and request.adapter not in self.in_use
        return self.in_use.num_pages + (self.adapter_pages(request) if needs_more else 0)


def _sequences(request: Request) -> list[tuple[int, int]]:
    """(tokens held, tokens coming) of each of its outputs."""
    return [(request.held_tokens, request.coming_tokens)] * request.num_outputs
