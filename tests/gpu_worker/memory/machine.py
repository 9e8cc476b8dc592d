"""Any order of calls on the whole manager, with steps in flight, against an account kept from the answers alone."""

from collections.abc import Iterable
from dataclasses import dataclass

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gpu_worker.memory.adapter_cache import AdapterInUseError
from gpu_worker.memory.allocator import OutOfPagesError
from gpu_worker.memory.manager import MemoryManager
from gpu_worker.memory.prefix_cache import PrefixKeys
from tests.gpu_worker.support import SMALL_PAGES, layout_of_pages

NUM_PAGES = 12
PAGE = SMALL_PAGES.page_size
MAX_TOKENS = 5 * PAGE
# pages of each adapter; the base model is the empty name
ADAPTERS = {"": 0, "one": 1, "two": 2, "five": 5}
SALTS = ("a", "b")
# A step more may be launched than has completed, and one more planned on top of it.
MAX_STEPS_IN_FLIGHT = 2
# Prompts that part after none, one and two pages.
STREAMS = {
    "x": list(range(MAX_TOKENS)),
    "x then y": [*range(PAGE), *range(100, 100 + MAX_TOKENS - PAGE)],
    "x then z": [*range(2 * PAGE), *range(200, 200 + MAX_TOKENS - 2 * PAGE)],
    "w": list(range(300, 300 + MAX_TOKENS)),
}
# What a full page holds: adapter, salt and all tokens up to its end.
Content = tuple[str, str, tuple[int, ...]]


@dataclass
class Running:
    """An admitted sequence."""

    adapter: str
    salt: str
    stream: str
    num_tokens: int
    # full pages that it has published or began with
    published: int

    def content(self, page: int) -> Content:
        return self.adapter, self.salt, tuple(STREAMS[self.stream][: (page + 1) * PAGE])

    def contents(self) -> list[Content]:
        return [self.content(page) for page in range(self.published)]


def keys_of(adapter: str, salt: str, stream: str, num_tokens: int) -> list[bytes]:
    prefix = PrefixKeys(adapter, salt, PAGE)
    prefix.extend(STREAMS[stream][:num_tokens])
    return prefix.keys


class MemoryMachine(RuleBasedStateMachine):
    """Knows what is in each page, who holds it, and which launched step may still touch it."""

    # of all machines
    calls = 0

    def __init__(self) -> None:
        super().__init__()
        # Invariants are asked once before the first call.
        MemoryMachine.calls -= 1
        self.memory = MemoryManager(SMALL_PAGES, NUM_PAGES)
        self.launched = self.completed = 0
        self.running: dict[str, Running] = {}
        self.pinned: set[str] = set()
        # What can be found by its key, and the page it is in.
        self.cached: dict[Content, int] = {}
        # page -> the last launched step that may touch it
        self.touched: dict[int, int] = {}
        self.admitted = 0

    # What this test knows.

    def loading(self) -> list[str]:
        return sorted(adapter.adapter_version for adapter in self.memory.adapters if adapter.loading)

    def resident(self) -> set[str]:
        return {adapter.adapter_version for adapter in self.memory.adapters if not adapter.loading}

    def in_use(self) -> set[str]:
        return {sequence.adapter for sequence in self.running.values()} | self.pinned

    def cold_pages(self, *, excluding: str = "") -> int:
        """Of adapters that nobody uses and no step in flight reads."""
        cold = self.resident() - self.in_use() - {excluding}
        found = [adapter.pages for adapter in self.memory.adapters if adapter.adapter_version in cold]
        return sum(len(pages) for pages in found if not self.in_flight(pages))

    def unreferenced(self, *, excluding: Iterable[Content] = ()) -> dict[Content, int]:
        held = {content for sequence in self.running.values() for content in sequence.contents()}
        return {content: page for content, page in self.cached.items() if content not in held | set(excluding)}

    def evictable_pages(self, *, adapter: str = "", excluding: Iterable[Content] = ()) -> int:
        prefix = [page for page in self.unreferenced(excluding=excluding).values() if not self.in_flight([page])]
        return len(prefix) + self.cold_pages(excluding=adapter)

    def in_flight(self, pages: Iterable[int]) -> list[int]:
        return [page for page in pages if self.touched.get(page, 0) > self.completed]

    def table(self, name: str) -> list[int]:
        return list(self.memory.kv.page_table(name))

    # What may have been evicted: seen from outside, and held against what was allowed.

    def see_evictions(
        self, before: "Snapshot", need: int, keep: Iterable[Content] = (), adapters: Iterable[str] = ()
    ) -> None:
        """Whatever is gone was evictable and needed; what is left of a prefix is its beginning."""
        left = {page.page for page in self.memory.prefixes}
        gone = {content: page for content, page in self.cached.items() if page not in left}
        for content, page in gone.items():
            assert content in before.unreferenced, "a page that somebody holds was evicted"
            assert content not in keep, "a hit was evicted for itself"
            assert not self.in_flight([page])
            del self.cached[content]
        for used, salt, tokens in self.cached:
            assert len(tokens) == PAGE or (used, salt, tokens[:-PAGE]) in self.cached, "the beginning went first"
        lost = before.resident - self.resident()
        assert not lost & (before.in_use.union(adapters)), "an adapter in use was evicted"
        if gone or lost:
            assert need > before.free, "evicted without need"

    @rule(
        adapter=st.sampled_from(sorted(ADAPTERS)),
        salt=st.sampled_from(SALTS),
        stream=st.sampled_from(sorted(STREAMS)),
        num_tokens=st.integers(1, MAX_TOKENS),
        loads_at_once=st.sampled_from([True, True, False]),
    )
    def admit(self, adapter: str, salt: str, stream: str, num_tokens: int, loads_at_once: bool) -> None:
        self.try_to_admit(adapter, salt, stream, num_tokens, loads_at_once=loads_at_once)

    @precondition(lambda self: self.cached)
    @rule(data=st.data(), more_tokens=st.integers(1, 2 * PAGE))
    def admit_with_a_hit(self, data: st.DataObject, more_tokens: int) -> None:
        adapter, salt, tokens = data.draw(st.sampled_from(sorted(self.cached)))
        alike = [stream for stream in sorted(STREAMS) if STREAMS[stream][: len(tokens)] == list(tokens)]
        num_tokens = min(MAX_TOKENS, len(tokens) + more_tokens)
        self.try_to_admit(adapter, salt, data.draw(st.sampled_from(alike)), num_tokens, loads_at_once=True)

    def try_to_admit(self, adapter: str, salt: str, stream: str, num_tokens: int, *, loads_at_once: bool) -> None:
        known = adapter in self.resident() | set(self.loading())
        keys = keys_of(adapter, salt, stream, num_tokens - 1)
        new = Running(adapter, salt, stream, num_tokens, len(keys))
        new.published = next((i for i, c in enumerate(new.contents()) if c not in self.cached), len(keys))
        hits = [self.cached[content] for content in new.contents()]
        assert self.memory.cached_tokens(keys) == len(hits) * PAGE
        need = SMALL_PAGES.pages_for_tokens(num_tokens) - len(hits) + (0 if known else ADAPTERS[adapter])
        evictable = self.evictable_pages(adapter=adapter, excluding=new.contents())
        before = Snapshot(self)
        fits = before.free + evictable >= need
        name = f"s{self.admitted}"
        layout = layout_of_pages(ADAPTERS[adapter]) if adapter else None
        assert self.memory.admit(name, num_tokens, adapter, layout, keys) == fits
        if not fits:
            assert Snapshot(self) == before
            return
        self.see_evictions(before, need, new.contents(), [adapter])
        self.admitted += 1
        self.running[name] = new
        assert self.table(name)[: len(hits)] == hits
        taken = self.table(name)[len(hits) :]
        if adapter and not known:
            taken += self.pages_of(adapter)
        assert self.in_flight(taken) == []
        if loads_at_once and adapter in self.loading():
            self.memory.finish_loading(adapter, 1.0)

    def pages_of(self, adapter: str) -> list[int]:
        found = self.memory.adapters.get(adapter)
        assert found is not None
        return found.pages

    @rule(
        adapter=st.sampled_from(sorted(ADAPTERS)[1:]),
        keep=st.sampled_from([None, set(), {"one"}, {"two", "five"}, set(ADAPTERS)]),
        beyond=st.integers(-2, 1),
        loads_at_once=st.sampled_from([True, True, False]),
    )
    def prefetch(self, adapter: str, keep: set[str] | None, beyond: int, loads_at_once: bool) -> None:
        """About as much as there is: `beyond` more pages than that, or fewer."""
        before = Snapshot(self)
        absent = adapter not in self.resident() | set(self.loading())
        kept = 0 if keep is None else sum(self.cold_pages() - self.cold_pages(excluding=name) for name in keep)
        evictable = 0 if keep is None else self.evictable_pages() - kept
        spare_pages = max(0, before.free + evictable - ADAPTERS[adapter] + beyond)
        need = ADAPTERS[adapter] + spare_pages
        fits = absent and before.free + evictable >= need
        layout = layout_of_pages(ADAPTERS[adapter])
        assert self.memory.prefetch(adapter, layout, keep=keep, spare_pages=spare_pages) == fits
        if not fits:
            assert Snapshot(self) == before
            return
        self.see_evictions(before, need, adapters=keep or ())
        assert self.in_flight(self.pages_of(adapter)) == []
        if loads_at_once:
            self.memory.finish_loading(adapter, 1.0)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), extra=st.integers(0, 3 * PAGE))
    def grow(self, data: st.DataObject, extra: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.running)))
        sequence, held = self.running[name], self.table(name)
        num_tokens = min(MAX_TOKENS, sequence.num_tokens + extra)
        need = SMALL_PAGES.pages_for_tokens(num_tokens) - len(held)
        before = Snapshot(self)
        fits = before.free + self.evictable_pages() >= need
        assert self.memory.grow(name, num_tokens) == fits
        if not fits:
            assert Snapshot(self) == before
            return
        self.see_evictions(before, need)
        sequence.num_tokens = num_tokens
        assert self.table(name)[: len(held)] == held, "a page table changed"
        assert len(self.table(name)) == SMALL_PAGES.pages_for_tokens(num_tokens)
        assert self.in_flight(self.table(name)[len(held) :]) == []

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.running)))
        sequence = self.running[name]
        self.fill(name, data.draw(st.integers(sequence.published, sequence.num_tokens // PAGE)))

    def fill(self, name: str, full: int) -> None:
        """The first `full` pages of the sequence are computed."""
        sequence = self.running[name]
        keys = keys_of(sequence.adapter, sequence.salt, sequence.stream, full * PAGE)
        pages = self.table(name)
        self.memory.publish(name, keys)
        for page in range(sequence.published, full):
            self.cached.setdefault(sequence.content(page), pages[page])
        sequence.published = full
        assert self.table(name) == pages

    @precondition(lambda self: self.running)
    @rule()
    def ask_for_more_than_is_free(self) -> None:
        """Past the façade's own arithmetic: the allocator gives all or nothing."""
        before = Snapshot(self)
        with pytest.raises(OutOfPagesError):
            self.memory.kv.extend(min(self.running), before.free + 1)
        assert Snapshot(self) == before

    @precondition(lambda self: self.running)
    @rule(data=st.data(), returning=st.booleans())
    def release(self, data: st.DataObject, returning: bool) -> None:
        self.let_go(data.draw(st.sampled_from(sorted(self.running))), returning=returning)

    def let_go(self, name: str, *, returning: bool = False) -> None:
        # The launched step may touch whatever the sequence holds or refers to.
        pages = self.table(name)
        sequence = self.running.pop(name)
        pages += [self.cached[content] for content in sequence.contents()]
        self.touched |= dict.fromkeys(pages, self.launched)
        self.memory.release(name, sequence.adapter, self.launched, returning=returning)

    @precondition(lambda self: self.loading())
    @rule(data=st.data(), works=st.sampled_from([True, True, False]), seconds=st.floats(0.0, 10.0))
    def end_a_load(self, data: st.DataObject, works: bool, seconds: float) -> None:
        adapter = data.draw(st.sampled_from(self.loading()))
        if works:
            self.memory.finish_loading(adapter, seconds)
            assert adapter in self.resident()
            return
        for name in [name for name, sequence in self.running.items() if sequence.adapter == adapter]:
            self.let_go(name)
        self.memory.drop_failed(adapter)
        assert adapter not in self.resident() | set(self.loading())

    @rule(adapter=st.sampled_from(sorted(ADAPTERS)[1:]))
    def evict(self, adapter: str) -> None:
        evictable = adapter in self.resident() - self.in_use()
        try:
            freed = self.memory.evict(adapter)
        except (AdapterInUseError, KeyError):
            assert not evictable
        else:
            assert (evictable, freed) == (True, ADAPTERS[adapter])
            assert adapter not in self.resident()

    @precondition(lambda self: self.resident())
    @rule(data=st.data(), pinned=st.booleans())
    def pin(self, data: st.DataObject, pinned: bool) -> None:
        adapter = data.draw(st.sampled_from(sorted(self.resident())))
        self.memory.adapters.set_operator_pin(adapter, pinned=pinned)
        self.pinned = self.pinned | {adapter} if pinned else self.pinned - {adapter}

    @precondition(lambda self: self.loading())
    @rule()
    def pin_too_early(self) -> None:
        with pytest.raises(KeyError):
            self.memory.adapters.set_operator_pin(self.loading()[0], pinned=True)

    @precondition(lambda self: self.launched < self.completed + MAX_STEPS_IN_FLIGHT)
    @rule()
    def launch(self) -> None:
        """A step that computes whatever the running sequences have room for and reads their adapters."""
        self.launched += 1
        for name, sequence in self.running.items():
            if sequence.adapter in self.loading():
                continue
            pages = self.table(name)
            if found := self.memory.adapters.get(sequence.adapter):
                self.memory.adapters.touch(sequence.adapter, self.launched)
                pages += found.pages
            self.touched |= dict.fromkeys(pages, self.launched)
            self.fill(name, sequence.num_tokens // PAGE)

    @precondition(lambda self: self.completed < self.launched)
    @rule()
    def complete(self) -> None:
        self.completed += 1
        self.memory.complete(self.completed)

    @invariant()
    def one_more_call(self) -> None:
        MemoryMachine.calls += 1

    @invariant()
    def every_page_has_one_owner(self) -> None:
        self.memory.check_integrity()

    @invariant()
    def the_kinds_add_up(self) -> None:
        counts = self.memory.counts()
        held = counts.quarantined + counts.loading + counts.kv + counts.prefix + counts.adapters
        assert counts.free + held == counts.total == NUM_PAGES

    @invariant()
    def kv_and_prefix_are_what_they_should_be(self) -> None:
        held = {page for name in self.running for page in self.table(name)}
        twins = {self.cached[content] for sequence in self.running.values() for content in sequence.contents()}
        counts = self.memory.counts()
        assert counts.kv == len(held | twins)
        assert counts.prefix == len(self.unreferenced())

    @invariant()
    def loading_and_adapters_are_what_they_should_be(self) -> None:
        counts = self.memory.counts()
        assert counts.loading == sum(ADAPTERS[adapter] for adapter in self.loading())
        assert counts.adapters == sum(ADAPTERS[adapter] for adapter in self.resident())

    @invariant()
    def quarantined_pages_are_in_flight(self) -> None:
        assert self.memory.counts().quarantined <= len(self.in_flight(self.touched))

    @invariant()
    def adapters_in_use_are_here(self) -> None:
        assert self.in_use() - {""} <= self.resident() | set(self.loading())

    @invariant()
    def pinned_pages_are_told_truly(self) -> None:
        for excluding in ("", "two"):
            told = self.memory.adapters.operator_pinned_pages(excluding=excluding)
            assert told == sum(ADAPTERS[adapter] for adapter in self.pinned - {excluding})
        assert self.memory.adapters.num_operator_pinned == len(self.pinned)

    @invariant()
    def evictable_pages_are_told_truly(self) -> None:
        assert self.memory.evictable_pages == self.evictable_pages()


class Snapshot:
    """What must not change when a call is refused."""

    def __init__(self, machine: MemoryMachine) -> None:
        self.counts = machine.memory.counts()
        self.evictable = machine.memory.evictable_pages
        self.free = self.counts.free
        self.unreferenced = machine.unreferenced()
        self.resident = machine.resident()
        self.in_use = machine.in_use()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Snapshot) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]  # compared, never kept in a set
