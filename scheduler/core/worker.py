"""One registered worker as the core sees it: what it has, what it was given, and what it was told."""

import math
from collections.abc import Iterable

from scheduler.core.commands import Action, Command, Preempt
from scheduler.core.costs import CostModel, FactSum
from scheduler.core.homes import Home
from scheduler.core.lines import Line
from scheduler.core.model import Capacity, Hello, Key, Progress, Request, RequestState, Residency, Tier
from scheduler.core.prefixes import PrefixMemory
from scheduler.core.room import Room
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
        # Of those that run, the ones whose tokens are read as they come.
        self.num_streaming = 0
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
        self.room = Room(self.capacity, self.residents, settings.adapter_pool_share)
        # By its requests, those that are rotated out excepted.
        self.in_use = self.room.in_use
        # Requests that were told to give their pages back in favour of another adapter, and have not run since; each
        # with the number of that command.
        self.rotated: dict[Key, int] = {}
        # Adapters it was told to bring to host memory.
        self._prefetched: dict[str, None] = {}
        self._prefixes = PrefixMemory(settings.max_prefix_hashes)
        # Requests that were told to give their pages back in favour of another tenant, and have not run since; each
        # with the number of that command. They count as present: what ends is followed by them, not by others.
        self.displaced: dict[Key, int] = {}
        # Tenant -> its sequences, those of requests that are rotated out excepted.
        self.tenants: dict[str, int] = {}
        # When a request was last preempted for a tenant below its share.
        self.preempted_at = -math.inf
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
            or self.room.num_sequences >= self.capacity.max_sequences
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

    def can_take(self, request: Request) -> bool:
        """Whether it may be given the request now."""
        return not self.full and self.room.fits(request)

    def can_take_instead_of(self, request: Request, other: Request) -> bool:
        """Whether it may be given the request when the other one, and those displaced before, have made room."""
        if self.draining or self.num_waiting + 1 >= self._settings.max_waiting_requests:
            return False
        return self.room.fits_without(request, {other.key, *self.displaced})

    def add(self, request: Request, now: float) -> None:
        """The request is on the worker from now on."""
        request.worker_id = self.worker_id
        self.requests[request.key] = request
        self.given_tokens += request.remaining_tokens
        self._load(request, 1)
        self._enter(request, now)

    def remove(self, request: Request) -> None:
        """The request has left the worker. Raises KeyError when it was not there."""
        del self.requests[request.key]
        self._load(request, -1)
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
        self._load(request, -1)
        held_pages = self.room.held_pages(request)
        request.state, request.computed_tokens, request.generated_tokens = told
        request.expected_tokens = expected_tokens
        self._load(request, 1)
        if request.state is RequestState.RUNNING and self.applied_seq >= self.displaced.get(request.key, math.inf):
            del self.displaced[request.key]
        preempt_seq = self.rotated.get(request.key)
        if preempt_seq is None:
            self.room.moved(request, held_pages)
        elif request.state is RequestState.RUNNING and self.applied_seq >= preempt_seq:
            del self.rotated[request.key]
            self._enter(request, now)
        return True

    def _load(self, request: Request, sign: int) -> None:
        """Counts what it has still to do, and that it runs."""
        self.outstanding_tokens += sign * request.remaining_tokens
        if request.state is RequestState.RUNNING:
            self.num_running += sign
            self.num_streaming += 0 if request.whole else sign

    def _enter(self, request: Request, now: float) -> None:
        if request.adapter and request.adapter not in self.in_use:
            self.home.enter(request.adapter)
        self.room.enter(request, now)
        self._count(request, 1)

    def _exit(self, request: Request) -> None:
        self.room.leave(request)
        if request.adapter and request.adapter not in self.in_use:
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
        self.tenants[request.tenant] = self.tenants.get(request.tenant, 0) + sign * request.num_outputs
        if not self.tenants[request.tenant]:
            del self.tenants[request.tenant]
