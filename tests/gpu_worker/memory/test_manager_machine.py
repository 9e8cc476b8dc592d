"""Any order of calls, with steps in flight: the books balance, and what fits by the numbers is admitted."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gpu_worker.memory.adapter_cache import AdapterInUseError
from gpu_worker.memory.manager import MemoryManager
from tests.gpu_worker.support import SMALL_PAGES, layout_of_pages

NUM_PAGES = 12
# pages of each adapter; the base model is the empty name
ADAPTERS = {"": 0, "one": 1, "two": 2, "three": 3, "seven": 7}
# A step more may be launched than has completed, and one more planned on top of it.
MAX_STEPS_IN_FLIGHT = 2


class MemoryMachine(RuleBasedStateMachine):
    """Keeps its own account of who holds what, from the answers alone."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = MemoryManager(SMALL_PAGES, NUM_PAGES)
        self.launched = self.completed = 0
        # sequence -> (adapter, tokens)
        self.running: dict[str, tuple[str, int]] = {}
        self.pinned: set[str] = set()
        # page -> the last launched step that may touch it
        self.touched: dict[int, int] = {}
        self.admitted = 0

    def loading(self) -> list[str]:
        return sorted(adapter.adapter_version for adapter in self.memory.adapters if adapter.loading)

    def resident(self) -> set[str]:
        return {adapter.adapter_version for adapter in self.memory.adapters if not adapter.loading}

    def in_use(self) -> set[str]:
        return {adapter for adapter, _ in self.running.values()} | self.pinned

    def evictable_pages(self, *, excluding: str = "") -> int:
        """By this test's own account: cold, and no step in flight reads it."""
        cold = self.resident() - self.in_use() - {excluding}
        found = [adapter for adapter in self.memory.adapters if adapter.adapter_version in cold]
        return sum(len(adapter.pages) for adapter in found if adapter.last_step <= self.completed)

    def assert_not_in_flight(self, pages: set[int]) -> None:
        assert [page for page in pages if self.touched.get(page, 0) > self.completed] == []

    @rule(adapter=st.sampled_from(sorted(ADAPTERS)), num_tokens=st.integers(1, 40))
    def admit(self, adapter: str, num_tokens: int) -> None:
        known = adapter in self.resident() | set(self.loading())
        need = SMALL_PAGES.pages_for_tokens(num_tokens) + (0 if known else ADAPTERS[adapter])
        fits = self.memory.counts().free + self.evictable_pages(excluding=adapter) >= need
        before, present = self.memory.counts(), {a.adapter_version for a in self.memory.adapters}
        name = f"s{self.admitted}"
        layout = layout_of_pages(ADAPTERS[adapter]) if adapter else None
        assert self.memory.admit(name, num_tokens, adapter, layout) == fits
        if not fits:
            assert self.memory.counts() == before
            assert {a.adapter_version for a in self.memory.adapters} == present
            return
        self.admitted += 1
        self.running[name] = (adapter, num_tokens)
        taken = set(self.memory.kv.page_table(name))
        if adapter and not known:
            added = self.memory.adapters.get(adapter)
            assert added is not None
            taken |= set(added.pages)
        self.assert_not_in_flight(taken)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), extra=st.integers(0, 12))
    def grow(self, data: st.DataObject, extra: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.running)))
        adapter, num_tokens = self.running[name]
        held = set(self.memory.kv.page_table(name))
        need = SMALL_PAGES.pages_for_tokens(num_tokens + extra) - len(held)
        fits = self.memory.counts().free + self.evictable_pages() >= need
        before = self.memory.counts()
        assert self.memory.grow(name, num_tokens + extra) == fits
        if fits:
            self.running[name] = (adapter, num_tokens + extra)
            self.assert_not_in_flight(set(self.memory.kv.page_table(name)) - held)
        else:
            assert self.memory.counts() == before

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.running)))
        adapter, _ = self.running.pop(name)
        self.memory.release(name, adapter, self.launched)

    @precondition(lambda self: self.loading())
    @rule(data=st.data(), works=st.booleans())
    def end_a_load(self, data: st.DataObject, works: bool) -> None:
        adapter = data.draw(st.sampled_from(self.loading()))
        if works:
            self.memory.finish_loading(adapter)
            return
        for name in [name for name, (used, _) in self.running.items() if used == adapter]:
            del self.running[name]
            self.memory.release(name, adapter, self.launched)
        self.memory.drop_failed(adapter)

    @rule(adapter=st.sampled_from(sorted(ADAPTERS)[1:]))
    def evict(self, adapter: str) -> None:
        evictable = adapter in self.resident() - self.in_use()
        try:
            freed = self.memory.evict(adapter)
        except (AdapterInUseError, KeyError):
            assert not evictable
        else:
            assert (evictable, freed) == (True, ADAPTERS[adapter])

    @precondition(lambda self: self.resident())
    @rule(data=st.data(), pinned=st.booleans())
    def pin(self, data: st.DataObject, pinned: bool) -> None:
        adapter = data.draw(st.sampled_from(sorted(self.resident())))
        self.memory.adapters.set_operator_pin(adapter, pinned=pinned)
        self.pinned = self.pinned | {adapter} if pinned else self.pinned - {adapter}

    @precondition(lambda self: self.launched < self.completed + MAX_STEPS_IN_FLIGHT)
    @rule()
    def launch(self) -> None:
        """A step that writes the KV of every running sequence and reads their adapters."""
        self.launched += 1
        for name, (adapter, _) in self.running.items():
            if adapter in self.loading():
                continue
            pages = set(self.memory.kv.page_table(name))
            if found := self.memory.adapters.get(adapter):
                self.memory.adapters.touch(adapter, self.launched)
                pages |= set(found.pages)
            self.touched |= dict.fromkeys(pages, self.launched)

    @precondition(lambda self: self.completed < self.launched)
    @rule()
    def complete(self) -> None:
        self.completed += 1
        self.memory.complete(self.completed)

    @invariant()
    def every_page_has_one_owner(self) -> None:
        self.memory.check_integrity()

    @invariant()
    def the_kinds_add_up(self) -> None:
        counts = self.memory.counts()
        held = counts.quarantined + counts.loading + counts.kv + counts.prefix + counts.adapters
        assert counts.free + held == counts.total == NUM_PAGES

    @invariant()
    def kv_is_what_the_sequences_need(self) -> None:
        needed = sum(SMALL_PAGES.pages_for_tokens(num_tokens) for _, num_tokens in self.running.values())
        assert self.memory.counts().kv == needed

    @invariant()
    def adapters_in_use_are_here(self) -> None:
        assert self.in_use() - {""} <= self.resident() | set(self.loading())

    @invariant()
    def evictable_pages_are_told_truly(self) -> None:
        assert self.memory.evictable_pages == self.evictable_pages()


TestMemoryMachine = MemoryMachine.TestCase
TestMemoryMachine.settings = settings(max_examples=120, stateful_step_count=50)
