"""(b), (c), (d): decisions only. The manager itself with traces played to it; a clock of steps, no model and no bytes.

Costs are those of Llama-3.1-8B in bfloat16 on a device that reads 20 GB/s from its host and prefills 10,000 tokens a
second: 42 MB of rank 8 take 2.1 ms, a page of 16 tokens takes 1.6 ms to compute again.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.memory.geometry import MODELS, layout_of, pages_of
from common.packing import MODULES, PackedLayout
from gpu_worker.memory.eviction import EvictionPolicy, LeastRecentlyUsed, LeastWorth
from gpu_worker.memory.manager import MemoryManager

MODEL = MODELS["Llama-3.1-8B"]
GEOMETRY = pages_of(MODEL)
BYTES_PER_SECOND, TOKENS_PER_SECOND, LOAD_LATENCY = 20e9, 10_000.0, 0.5e-3
RANKS = (8, 16, 32, 64)
STEP_TOKENS = GEOMETRY.page_size
LAYOUTS = {rank: layout_of(MODEL, MODULES, rank) for rank in RANKS}


def layout_for(adapter: int) -> PackedLayout:
    return LAYOUTS[RANKS[adapter % len(RANKS)]]


def load_seconds(layout: PackedLayout) -> float:
    return LOAD_LATENCY + layout.total_bytes / BYTES_PER_SECOND


@dataclass(frozen=True, slots=True)
class Turn:
    """A request of a conversation: its prompt begins with all that was said before, `said_tokens` of it."""

    adapter: int
    conversation: int
    said_tokens: int
    prompt_tokens: int
    output_tokens: int
    # Not 0: a number of its own, for a turn that nobody goes on with.
    single: int = 0


@dataclass(slots=True)
class Running:
    name: str
    turn: Turn
    tokens: int
    left: int
    version: str = ""


@dataclass(slots=True)
class Replay:
    """Plays turns to a manager: admission in order, a page of tokens a step, what is complete stays as prefixes."""

    memory: MemoryManager
    max_running: int
    # Of what was in pages once: loads of adapters loaded before, tokens computed before.
    miss_seconds: float = 0.0
    # Of everything, what nobody could have had at hand included.
    all_seconds: float = 0.0
    loads: int = 0
    _loaded: set[str] = field(default_factory=set)
    _computed: set[bytes] = field(default_factory=set)
    waiting: deque[Turn] = field(default_factory=deque)
    running: dict[str, Running] = field(default_factory=dict)
    _names: int = 0
    _step: int = 0

    def step(self) -> None:
        """Admits, then lets every running sequence grow by a page of tokens; ends those that are done."""
        self._step += 1
        while self.waiting and len(self.running) < self.max_running and self._admit(self.waiting[0]):
            self.waiting.popleft()
        for sequence in list(self.running.values()):
            if sequence.name not in self.running:
                continue
            length = min(STEP_TOKENS, sequence.left)
            while not self.memory.grow(sequence.name, sequence.tokens + length):
                victim = next(reversed(self.running.values()))
                self._end(victim, returning=True)
                self.waiting.appendleft(victim.turn)
                if victim is sequence:
                    break
            if sequence.name in self.running:
                sequence.tokens += length
                sequence.left -= length
                if not sequence.left:
                    published = keys(sequence.turn, sequence.tokens)
                    self._computed.update(published)
                    self.memory.publish(sequence.name, published)
                    self._end(sequence)
        self.memory.complete(self._step)

    def _admit(self, turn: Turn) -> bool:
        version, layout = f"adapter-{turn.adapter}", layout_for(turn.adapter)
        wanted = keys(turn, turn.prompt_tokens - 1)
        cached = self.memory.cached_tokens(wanted)
        missing = self.memory.adapters.get(version) is None
        self._names += 1
        name = str(self._names)
        if not self.memory.admit(name, turn.prompt_tokens, version, layout, wanted):
            return False
        if missing:
            self.loads += 1
            self.all_seconds += load_seconds(layout)
            self.miss_seconds += load_seconds(layout) * (version in self._loaded)
            self._loaded.add(version)
            self.memory.finish_loading(version, load_seconds(layout))
        computed = turn.prompt_tokens - cached
        page_size = GEOMETRY.page_size
        again = page_size * sum(key in self._computed for key in wanted[cached // page_size :])
        self.all_seconds += computed / TOKENS_PER_SECOND
        self.miss_seconds += again / TOKENS_PER_SECOND
        self.memory.costs.prefilled(computed, computed / TOKENS_PER_SECOND)
        self.memory.adapters.touch(version, self._step)
        published = keys(turn, turn.prompt_tokens)
        self._computed.update(published)
        self.memory.publish(name, published)
        self.running[name] = Running(name, turn, turn.prompt_tokens, turn.output_tokens, version)
        return True

    def _end(self, sequence: Running, *, returning: bool = False) -> None:
        del self.running[sequence.name]
        self.memory.release(sequence.name, sequence.version, self._step, returning=returning)


def keys(turn: Turn, num_tokens: int) -> list[bytes]:
    """One for each full page; equal for equal beginnings of one conversation under one adapter.

    What follows a system prompt is nobody else's: the turn itself is in its keys.
    """
    size, said = GEOMETRY.page_size, turn.said_tokens // GEOMETRY.page_size
    own = f"{turn.adapter}/{turn.conversation}"
    if turn.single:
        return [f"{own}/{page}/{turn.single if page >= said else 0}".encode() for page in range(num_tokens // size)]
    return [f"{own}/{page}".encode() for page in range(num_tokens // size)]


def conversations(weights: Sequence[float], num_turns: int, seed: int) -> Iterator[Turn]:
    """Each turn belongs to an adapter drawn by `weights`; it goes on with one of its conversations or begins one."""
    rng = np.random.default_rng(seed)
    shares = np.asarray(weights) / np.sum(weights)
    lengths: dict[tuple[int, int], int] = {}
    begun = dict.fromkeys(range(len(weights)), 0)
    for adapter in rng.choice(len(weights), size=num_turns, p=shares).tolist():
        if not begun[adapter] or rng.random() < 0.3:
            begun[adapter] += 1
        conversation = begun[adapter] - 1 - int(min(begun[adapter] - 1, rng.geometric(0.6) - 1))
        said = lengths.get((adapter, conversation), 0)
        if said > 2500:
            begun[adapter] += 1
            conversation, said = begun[adapter] - 1, 0
        prompt, output = said + int(rng.integers(32, 400)), int(rng.integers(16, 200))
        lengths[adapter, conversation] = prompt + output
        yield Turn(adapter, conversation, said, prompt, output)


def single_turns(weights: Sequence[float], num_turns: int, seed: int) -> Iterator[Turn]:
    """Each adapter has a system prompt that all its requests begin with; what follows is new."""
    rng = np.random.default_rng(seed)
    shares = np.asarray(weights) / np.sum(weights)
    system = rng.integers(4, 32, size=len(weights)) * GEOMETRY.page_size
    for number, adapter in enumerate(rng.choice(len(weights), size=num_turns, p=shares).tolist(), start=1):
        said = int(system[adapter])
        yield Turn(adapter, 0, said, said + int(rng.integers(16, 200)), int(rng.integers(16, 200)), number)


def zipf(exponent: float, count: int) -> list[float]:
    return [1 / rank**exponent for rank in range(1, count + 1)]


TRACES = {
    "uniform": [1.0] * 200,
    "zipf-0.8": zipf(0.8, 200),
    "zipf-1.0": zipf(1.0, 200),
    "zipf-1.2": zipf(1.2, 200),
    # S-LoRA: adapter = floor(n U^(1/alpha)), alpha 0.3
    "s-lora-0.3": [(((index + 1) / 200) ** 0.3 - (index / 200) ** 0.3) for index in range(200)],
}


REQUESTS = {"system prompts": single_turns, "conversations": conversations}


def eviction_rows(num_turns: int, seeds: Sequence[int] = (1, 2, 3)) -> list[dict[str, Any]]:
    """(d): seconds spent on bringing back what was in pages once; the same turns for both policies."""
    found = []
    cases = [(kind, name, seed) for kind in REQUESTS for name in TRACES for seed in seeds]
    for kind, name, seed in cases:
        turns = list(REQUESTS[kind](TRACES[name], num_turns, seed))
        joint, lru = (_miss(policy, turns) for policy in (LeastWorth(), LeastRecentlyUsed()))
        found.append(
            {
                "part": "eviction",
                "requests": kind,
                "trace": name,
                "seed": seed,
                "turns": num_turns,
                "joint_miss_seconds": round(joint.miss_seconds, 2),
                "lru_miss_seconds": round(lru.miss_seconds, 2),
                "joint_all_seconds": round(joint.all_seconds, 2),
                "lru_all_seconds": round(lru.all_seconds, 2),
                "joint_loads": joint.loads,
                "lru_loads": lru.loads,
                "fewer": round(1 - joint.miss_seconds / lru.miss_seconds, 4),
            }
        )
    return found


def _miss(policy: EvictionPolicy, turns: Sequence[Turn]) -> Replay:
    # Half of what the two hundred adapters alone would take.
    pages = sum(GEOMETRY.pages_for_bytes(layout_for(index).total_bytes) for index in range(200))
    replay = Replay(MemoryManager(GEOMETRY, pages // 2, policy), max_running=32)
    for turn in turns:
        replay.waiting.append(turn)
        while len(replay.waiting) > 2:
            replay.step()
    while replay.waiting or replay.running:
        replay.step()
    return replay


def share_rows(steps_of_a_phase: int = 4000, every: int = 100) -> list[dict[str, Any]]:
    """(c): who has the pool while 1, then 200, then 1 adapter is in play, at one rate of turns of conversations."""
    rng, num_pages = np.random.default_rng(3), 8192
    replay, found = Replay(MemoryManager(GEOMETRY, num_pages), max_running=64), []
    for phase, active in enumerate((1, 200, 1)):
        turns = conversations([1.0] * active, steps_of_a_phase, seed=phase)
        for step in range(steps_of_a_phase):
            if rng.random() < 0.4:
                replay.waiting.append(next(turns))
            replay.step()
            if step % every == every - 1:
                counts = replay.memory.counts()
                shares = {
                    kind: round(getattr(counts, kind) / num_pages, 4) for kind in ("kv", "prefix", "adapters", "free")
                }
                at = phase * steps_of_a_phase + step + 1
                about = {"part": "shares", "step": at, "active_adapters": active, "waiting": len(replay.waiting)}
                found.append(about | shares)
    return found


def reserve_rows() -> list[dict[str, Any]]:
    """(b): tokens of KV that are left in 40 GiB beside adapters of mixed ranks, and beside as many padded slots."""
    found = []
    for name, model in MODELS.items():
        geometry = pages_of(model)
        num_pages = 40 * 2**30 // geometry.page_bytes
        layouts = [layout_of(model, MODULES, rank) for rank in RANKS]
        slot_pages = -(-layouts[-1].total_bytes // geometry.page_bytes)
        for count in (8, 32, 128):
            memory = MemoryManager(geometry, num_pages)
            for index in range(count):
                if not memory.prefetch(f"adapter-{index}", layouts[index % len(layouts)]):
                    raise RuntimeError(f"{count} adapters do not fit {name}")
            free = memory.counts().free * geometry.page_size
            padded = max(0, num_pages - count * slot_pages) * geometry.page_size
            found.append(
                {
                    "part": "reserve",
                    "model": name,
                    "adapters": count,
                    "kv_tokens_left": free,
                    "kv_tokens_left_padded": padded,
                    "ratio": round(free / padded, 3) if padded else None,
                }
            )
    return found
