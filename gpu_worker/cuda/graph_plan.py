"""Which CUDA graph a step replays, and when one must be captured or captured again. Integers only."""

from collections.abc import Iterable
from dataclasses import dataclass

# Up to 8 by doubling, then by steps that waste at most a quarter of a step's rows.
_SMALL = (1, 2, 4, 8)
# Pages of a page table: 64 pages of 16 tokens are contexts up to 1,024.
MIN_TABLE_PAGES = 64
MIN_LORA_RANK = 16


def token_buckets(max_tokens: int) -> tuple[int, ...]:
    """Rows of a graph, ascending, the last one `max_tokens` exactly."""
    buckets = [size for size in _SMALL if size < max_tokens]
    size, step = 16, 8
    while size < max_tokens:
        buckets.append(size)
        step = max(step, size // 4)
        size += step
    return (*buckets, max_tokens)


def smallest_at_least(amount: int, sizes: Iterable[int]) -> int | None:
    """The first of ascending `sizes` that holds `amount`; None when none does."""
    return next((size for size in sizes if size >= amount), None)


def grown(amount: int, minimum: int) -> int:
    """`amount` rounded up to `minimum` times a power of two."""
    size = minimum
    while size < amount:
        size *= 2
    return size


@dataclass(frozen=True, slots=True)
class StepFacts:
    """What decides about a graph. `adapters` 0 = base model only."""

    tokens: int
    table_pages: int
    decode_only: bool
    adapters: int = 0
    max_lora_rank: int = 0
    adapter_pages: int = 0


@dataclass(frozen=True, slots=True)
class GraphKey:
    """A captured graph: rows, width of the page table, and whether it runs LoRA."""

    tokens: int
    table_pages: int
    has_lora: bool


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the LoRA part of every graph has room for: the largest rank and the pages of one adapter."""

    lora_rank: int = MIN_LORA_RANK
    adapter_pages: int = 1

    def hold(self, facts: StepFacts) -> bool:
        return facts.max_lora_rank <= self.lora_rank and facts.adapter_pages <= self.adapter_pages

    def raised(self, facts: StepFacts) -> "Ceilings":
        """Room for this step too; by doubling, so that growing adapters recapture a few times and not each time."""
        return Ceilings(grown(facts.max_lora_rank, self.lora_rank), grown(facts.adapter_pages, self.adapter_pages))


@dataclass(frozen=True, slots=True)
class GraphPlan:
    """`key` None = run eagerly. `outgrown`: graphs that no step may replay any more."""

    key: GraphKey | None
    must_capture: bool = False
    outgrown: tuple[GraphKey, ...] = ()


class GraphPlanner:
    """Two graphs a bucket (base only, with LoRA), captured when first needed.

    A graph has the scratch of a rank ceiling and reads tables of a capacity; a step beyond them raises the ceilings,
    which makes every LoRA graph outgrown: each is captured again when a step needs it next (lazy recapture).
    """

    def __init__(self, max_tokens: int) -> None:
        self._buckets = token_buckets(max_tokens)
        self._captured: set[GraphKey] = set()
        self.ceilings = Ceilings()

    def plan(self, facts: StepFacts) -> GraphPlan:
        """Books the graph as captured when it must be."""
        tokens = smallest_at_least(facts.tokens, self._buckets)
        if not facts.decode_only or tokens is None:
            return GraphPlan(None)
        outgrown: tuple[GraphKey, ...] = ()
        if facts.adapters and not self.ceilings.hold(facts):
            self.ceilings = self.ceilings.raised(facts)
            outgrown = tuple(key for key in self._captured if key.has_lora)
            self._captured.difference_update(outgrown)
        key = GraphKey(tokens, grown(facts.table_pages, MIN_TABLE_PAGES), facts.adapters > 0)
        must_capture = key not in self._captured
        self._captured.add(key)
        return GraphPlan(key, must_capture, outgrown)
