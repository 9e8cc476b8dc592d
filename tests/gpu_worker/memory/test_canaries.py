"""Steps that write late, over a real pool: whatever is aborted, finished, evicted or loaded, nobody's bytes change.

One step is always in flight: its writes land only when the next one is launched. Each page of KV carries a pattern of
what it should hold, adapters carry random bytes that are hashed after each load and every 100 steps.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pytest
import torch

from common.packing import PackedLayout
from gpu_worker.memory.allocator import PageAllocator
from gpu_worker.memory.manager import MemoryManager
from gpu_worker.memory.pool import PagePool
from gpu_worker.memory.prefix_cache import PrefixKeys
from tests.gpu_worker.support import SMALL_PAGES

NUM_PAGES = 24
PAGE = SMALL_PAGES.page_size
NUM_STEPS = 1500
Bytes = npt.NDArray[np.uint8]


class Careless(PageAllocator):
    """Frees at once whatever step may still write."""

    def free(self, pages: Sequence[int], last_step: int) -> None:
        super().free(pages, self.completed_step)


@dataclass
class Subject:
    """A running sequence; the pattern of a page depends on all tokens up to its end."""

    name: str
    adapter: str
    tokens: list[int]
    computed: int
    prefix: PrefixKeys = field(repr=False)

    def pattern(self, page: int) -> int:
        digest = hashlib.sha256(repr((self.adapter, self.tokens[: (page + 1) * PAGE])).encode()).digest()
        return 1 + digest[0] % 255


@dataclass
class Write:
    page: int
    pattern: int


class LateDevice:
    """Runs a real manager over a real pool, with writes that land a step late."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.memory = MemoryManager(SMALL_PAGES, NUM_PAGES)
        self.pool = PagePool(SMALL_PAGES, NUM_PAGES, "cpu")
        rng = np.random.default_rng(seed)
        sizes = {f"a{number}": 1 + number % 4 for number in range(9)}
        self.content: dict[str, Bytes] = {
            name: rng.integers(0, 256, pages * SMALL_PAGES.page_bytes - 7, dtype=np.uint8)
            for name, pages in sizes.items()
        }
        self.running: dict[str, Subject] = {}
        self.in_flight: list[Write] = []
        self.loading: list[str] = []
        self.step = self.number = 0
        self.loads = self.hits = self.aborted = 0
        self.damage: list[str] = []

    def run(self) -> None:
        for _ in range(NUM_STEPS):
            for _ in range(self.random.randrange(4)):
                self.random.choice([self.admit, self.admit, self.end, self.evict, self.finish_a_load])()
            self.launch()
            if self.step % 100 == 0:
                self.check_adapters()

    def admit(self) -> None:
        adapter = self.random.choice(["", *self.content])
        topic, length = self.random.randrange(3), self.random.randrange(1, 5 * PAGE)
        tokens = [topic * 100 + position for position in range(length)]
        subject = Subject(f"s{self.number}", adapter, tokens, 0, PrefixKeys(adapter, "", PAGE))
        subject.prefix.extend(tokens)
        keys = subject.prefix.keys[: (length - 1) // PAGE]
        cached, known = self.memory.cached_tokens(keys), self.memory.adapters.get(adapter)
        layout = PackedLayout("float32", self.content[adapter].size, ()) if adapter else None
        if not self.memory.admit(subject.name, length, adapter, layout, keys):
            return
        self.number += 1
        self.hits += cached
        subject.computed = cached
        self.running[subject.name] = subject
        if adapter and known is None:
            self.loading.append(adapter)
            # The copy is not part of any step: it lands now.
            self.pool.write(self.pages_of(adapter), self.content[adapter])

    def finish_a_load(self) -> None:
        if self.loading:
            adapter = self.loading.pop(self.random.randrange(len(self.loading)))
            self.memory.finish_loading(adapter)
            self.loads += 1
            self.check_adapter(adapter)

    def end(self) -> None:
        """Finished or aborted, while the last launched step may still write its pages."""
        if self.running:
            subject = self.running.pop(self.random.choice(sorted(self.running)))
            self.aborted += 1
            self.memory.release(subject.name, subject.adapter, self.step, returning=self.random.random() < 0.2)

    def evict(self) -> None:
        adapter = self.random.choice(sorted(self.content))
        found = self.memory.adapters.get(adapter)
        if found and found.cold:
            self.memory.evict(adapter)

    def launch(self) -> None:
        """The step before completes, its writes land, and the next one is under way."""
        for write in self.in_flight:
            self.pool.bytes[write.page] = write.pattern
        self.memory.complete(self.step)
        self.check_pages()
        self.step += 1
        self.in_flight = []
        for subject in self.running.values():
            if subject.adapter in self.loading:
                continue
            if subject.adapter:
                self.memory.adapters.touch(subject.adapter, self.step)
            table, full = self.memory.kv.page_table(subject.name), len(subject.tokens) // PAGE
            # Its last page, which is not full, is written again and again.
            for page in range(subject.computed // PAGE, len(table)):
                self.in_flight.append(Write(table[page], subject.pattern(page)))
            subject.computed = full * PAGE
            self.memory.publish(subject.name, subject.prefix.keys)

    def check_pages(self) -> None:
        """What the completed step computed or found is what every running sequence reads."""
        for subject in self.running.values():
            for page in range(subject.computed // PAGE):
                held = self.pool.bytes[self.memory.kv.page_table(subject.name)[page]]
                if not torch.all(held == subject.pattern(page)):
                    self.damage.append(f"page {page} of {subject.name} in step {self.step}")

    def check_adapters(self) -> None:
        self.memory.check_integrity()
        for adapter in self.memory.adapters:
            self.check_adapter(adapter.adapter_version)

    def check_adapter(self, adapter: str) -> None:
        content = self.content[adapter]
        held = self.pool.bytes[self.pages_of(adapter)].flatten()[: content.size].numpy().tobytes()
        if hashlib.sha256(held).digest() != hashlib.sha256(content.tobytes()).digest():
            self.damage.append(f"{adapter} in step {self.step}")

    def pages_of(self, adapter: str) -> list[int]:
        found = self.memory.adapters.get(adapter)
        assert found is not None
        return found.pages


@pytest.mark.parametrize("seed", range(3))
def test_no_byte_of_anybody_changes(seed: int) -> None:
    device = LateDevice(seed)
    device.run()
    assert device.damage == []
    # Without these it would prove nothing.
    assert min(device.loads, device.hits, device.aborted, device.memory.evictions, device.memory.prefix_evictions) > 100


@pytest.mark.parametrize("seed", range(3))
def test_without_the_quarantine_bytes_are_lost(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_worker.memory.manager.PageAllocator", Careless)
    device = LateDevice(seed)
    device.run()
    assert any(entry.startswith("a") for entry in device.damage), "no adapter was overwritten"
