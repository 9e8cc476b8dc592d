"""One registered worker as the core sees it: what it has, what it was given, and what it could still take."""

from collections.abc import Iterable

from scheduler.core.model import Abort, Capacity, Command, Hello, Key, Offer, Request, RequestState, Residency, Tier
from scheduler.core.pages import peak_pages
from scheduler.core.settings import Settings


class Worker:
    """Requests, adapters and commands of one worker, from one registration to its end."""

    def __init__(self, hello: Hello, epoch: int, settings: Settings) -> None:
        """`epoch` is that of the commands of this registration."""
        self.worker_id = hello.worker_id
        self.capacity: Capacity = hello.capacity
        self.identity = hello.identity
        self.epoch = epoch
        self.draining = False
        self.requests: dict[Key, Request] = {}
        self.residents: dict[str, Residency] = {}
        self.num_running = 0
        self.applied_seq = 0
        self.outstanding_tokens = 0
        # Tokens ever given to it: evens out workers that are equally idle.
        self.given_tokens = 0
        self._settings = settings
        self._seq = 0
        self._outbox: list[Command] = []
        self._residency_sequence: int | None = None
        # Adapter -> how many requests use it, and its pages.
        self._adapter_users: dict[str, int] = {}
        self._adapter_pages: dict[str, int] = {}
        self._num_adapter_pages = 0
        # Adapters in use that it does not have yet; None when they must be counted anew.
        self._num_fetched: int | None = 0
        self._num_sequences = 0
        # Pages when every sequence reaches its full context.
        self._full_pages = 0
        # (held, coming) of all sequences; None when it must be computed anew.
        self._profile: list[tuple[int, int]] | None = []
        # Sizes of the last request that did not fit; none of at least these sizes fits until something changes.
        self._misfit: tuple[int, int, int, int] | None = None
        for residency in hello.resident:
            self.residents[residency.adapter] = residency

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
        return adapter in self._adapter_users or self.tier(adapter) is not Tier.STORE

    @property
    def num_adapters(self) -> int:
        """Adapters it has, or fetches for its requests."""
        if self._num_fetched is None:
            self._num_fetched = sum(adapter not in self.residents for adapter in self._adapter_users)
        return len(self.residents) + self._num_fetched

    def tier(self, adapter: str) -> Tier:
        residency = self.residents.get(adapter)
        return residency.tier if residency else Tier.STORE

    def uses(self, adapter: str) -> bool:
        """One of its requests needs the adapter."""
        return adapter in self._adapter_users

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

    def can_take(self, request: Request) -> bool:
        """Whether it may be given the request now."""
        if self.full or self._num_sequences + request.num_outputs > self.capacity.max_sequences:
            return False
        adapters = self._pages_of_adapters_with(request)
        if adapters + self._full_pages + self.full_pages(request) <= self.capacity.num_pages:
            return True
        coming = request.coming_tokens(self._settings.output_estimate_ratio)
        sizes = (adapters, request.num_outputs, request.held_tokens, coming)
        if self._misfit and all(size >= limit for size, limit in zip(sizes, self._misfit, strict=True)):
            return False
        fits = self.peak_pages_with(request) <= self.capacity.num_pages
        if not fits:
            self._misfit = sizes
        return fits

    def peak_pages_with(self, request: Request) -> int:
        """Estimated pages at the peak of all its requests and this one."""
        if self._profile is None:
            self._profile = [pair for other in self.requests.values() for pair in self._sequences(other)]
        sequences = [*self._profile, *self._sequences(request)]
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
        if not self.can_take(request):
            peak = self.peak_pages_with(request)
            return f"its requests would need {peak} pages at their peak and its pool has {capacity.num_pages}"
        return ""

    def add(self, request: Request) -> None:
        """The request is on the worker from now on."""
        request.worker_id = self.worker_id
        self.requests[request.key] = request
        self.given_tokens += request.remaining_tokens
        if request.adapter:
            users = self._adapter_users.get(request.adapter, 0)
            if not users:
                self._adapter_pages[request.adapter] = self.adapter_pages(request)
                self._num_adapter_pages += self._adapter_pages[request.adapter]
            self._adapter_users[request.adapter] = users + 1
        self._count(request, 1)

    def remove(self, request: Request) -> None:
        """The request has left the worker. Raises KeyError when it was not there."""
        del self.requests[request.key]
        request.worker_id = ""
        if request.adapter:
            self._adapter_users[request.adapter] -= 1
            if not self._adapter_users[request.adapter]:
                del self._adapter_users[request.adapter]
                self._num_adapter_pages -= self._adapter_pages.pop(request.adapter)
        self._count(request, -1)

    def advance(self, request: Request, state: RequestState, computed_tokens: int) -> bool:
        """Takes in what the request does and how far it is; False when that is nothing new."""
        computed_tokens = max(computed_tokens, request.computed_tokens)
        if (state, computed_tokens) == (request.state, request.computed_tokens):
            return False
        self._count(request, -1)
        request.state, request.computed_tokens = state, computed_tokens
        self._count(request, 1)
        return True

    def command(self, action: Offer | Abort) -> int:
        """Queues a command and returns its number."""
        self._seq += 1
        self._outbox.append(Command(self._seq, action))
        return self._seq

    def take_commands(self) -> list[Command]:
        """The commands since the last call."""
        commands, self._outbox = self._outbox, []
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
            self._num_fetched = None
            if change.tier is Tier.STORE:
                self.residents.pop(change.adapter, None)
            else:
                self.residents[change.adapter] = change
        return True

    def _count(self, request: Request, sign: int) -> None:
        self.num_running += sign * (request.state is RequestState.RUNNING)
        self._num_sequences += sign * request.num_outputs
        self._full_pages += sign * self.full_pages(request)
        self.outstanding_tokens += sign * request.remaining_tokens
        self._profile = self._misfit = self._num_fetched = None

    def _pages_of_adapters_with(self, request: Request) -> int:
        needs_more = request.adapter and request.adapter not in self._adapter_users
        return self._num_adapter_pages + (self.adapter_pages(request) if needs_more else 0)

    def _sequences(self, request: Request) -> list[tuple[int, int]]:
        pair = (request.held_tokens, request.coming_tokens(self._settings.output_estimate_ratio))
        return [pair] * request.num_outputs
