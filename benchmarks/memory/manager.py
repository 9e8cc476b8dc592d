"""CPU of the memory manager: `python -m benchmarks.memory.manager`, one JSON line a row.

No model runs. 1,000 sequences decode over 200 resident adapters while 10,000 are known; each step grows every sequence
by a token, ends one sequence and admits another with a hit. Limit of a step: 1 ms for the manager.
"""

import gc
import itertools
import json
import random
import time
from collections.abc import Callable
from statistics import median

from benchmarks.hardware import commit, hardware
from common.packing import PackedLayout
from gpu_worker.memory.allocator import PageAllocator, PageKind
from gpu_worker.memory.geometry import PageGeometry
from gpu_worker.memory.manager import MemoryManager
from gpu_worker.memory.prefix_cache import PrefixKeys

GEOMETRY = PageGeometry(num_layers=32, num_kv_heads=8, head_dim=128, element_bytes=2, page_size=16)
SEQUENCES, RESIDENT, KNOWN, STEPS = 1000, 200, 10_000, 400
PROMPT = 512
LIMIT_SECONDS = 1e-3
LAYOUT = PackedLayout("bfloat16", 20 * GEOMETRY.page_bytes, ())


class Load:
    """A manager under steady load, driven as the batcher drives it."""

    def __init__(self) -> None:
        self.random = random.Random(1)
        self.memory = MemoryManager(GEOMETRY, 80_000)
        # Known: each was loaded once, and most have left again.
        for number in range(KNOWN):
            self.memory.prefetch(f"a{number}", LAYOUT, keep=())
            self.memory.finish_loading(f"a{number}", 0.01)
        self.names = [adapter.adapter_version for adapter in self.memory.adapters][-RESIDENT:]
        self.numbers = itertools.count()
        self.running: dict[str, tuple[str, PrefixKeys, int]] = {}
        for _ in range(SEQUENCES):
            self.admit()
        self.step = 0

    def admit(self) -> None:
        name, adapter = f"s{next(self.numbers)}", self.random.choice(self.names)
        keys = PrefixKeys(adapter, "tenant", GEOMETRY.page_size)
        # Half of the prompt is the adapter's own; the rest is new.
        keys.extend([*range(PROMPT // 2), *(self.random.randrange(1000) for _ in range(PROMPT // 2))])
        length = PROMPT + self.random.randrange(GEOMETRY.page_size)
        assert self.memory.admit(name, length, adapter, LAYOUT, keys.keys)
        self.memory.publish(name, keys.keys)
        self.running[name] = (adapter, keys, length)

    def one_step(self) -> None:
        """What the engine asks of the manager in a step."""
        memory = self.memory
        self.step += 1
        for name, (adapter, keys, length) in self.running.items():
            memory.grow(name, length + 1)
            self.running[name] = (adapter, keys, length + 1)
        for adapter in self.names:
            memory.adapters.touch(adapter, self.step)
        memory.complete(self.step)
        ended = next(iter(self.running))
        adapter, _, _ = self.running.pop(ended)
        memory.release(ended, adapter, self.step)
        memory.counts()
        memory.take_changes()


def seconds(call: Callable[[], object]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def page_seconds() -> tuple[float, float]:
    """CPU to allocate and to free a page, in runs of 32."""
    allocator = PageAllocator(100_000)
    taken: list[list[int]] = []
    allocate = seconds(lambda: taken.extend(allocator.allocate(32, PageKind.KV) for _ in range(3000)))
    free = seconds(lambda: free_all(allocator, taken))
    return allocate / (3000 * 32), free / (3000 * 32)


def free_all(allocator: PageAllocator, taken: list[list[int]]) -> None:
    for pages in taken:
        allocator.free(pages, 0)


def main() -> None:
    allocate, free = page_seconds()
    load = Load()
    gc.collect()
    steps, admissions = [], []
    for _ in range(STEPS):
        steps.append(seconds(load.one_step))
        admissions.append(seconds(load.admit))
    row = {
        "bench": "memory manager",
        "sequences": SEQUENCES,
        "resident_adapters": len(load.memory.adapters),
        "known_adapters": KNOWN,
        "allocate_seconds_per_page": allocate,
        "free_seconds_per_page": free,
        "step_seconds_p50": median(steps),
        "step_seconds_p99": sorted(steps)[int(len(steps) * 0.99)],
        "limit_seconds": LIMIT_SECONDS,
        "within_limit": median(steps) < LIMIT_SECONDS,
        "admission_of_512_tokens_seconds_p50": median(admissions),
        "hardware": hardware(),
        "commit": commit(),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
