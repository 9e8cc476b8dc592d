"""Random sequences over tiny pools until all have finished: order, progress, and every token computed once."""

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from common.packing import PackedLayout
from gpu_worker.batching import Batcher, StepPlan
from gpu_worker.memory.manager import MemoryManager
from gpu_worker.sequence import Sequence, SequenceState
from tests.gpu_worker.support import SMALL_PAGES, layout_of_pages, waiting_sequence

PAGE = SMALL_PAGES.page_size
ADAPTERS = {"": 0, "one": 1, "two": 2, "four": 4}


@dataclass(frozen=True, slots=True)
class Spec:
    num_prompt_tokens: int
    max_tokens: int
    adapter: str
    arrives: int
    order_key: int
    # prompts of one topic begin alike
    topic: int = 0

    @property
    def num_pages(self) -> int:
        # The last token drawn is never computed, but the worker counts it.
        return SMALL_PAGES.pages_for_tokens(self.num_prompt_tokens + self.max_tokens) + ADAPTERS[self.adapter]


@dataclass(frozen=True, slots=True)
class Scenario:
    specs: list[Spec]
    spare_pages: int
    max_step_tokens: int
    max_sequences: int
    # steps from the first offer to the host tier, and from there to pages
    fetch_steps: int
    load_steps: int

    @property
    def num_pages(self) -> int:
        """The largest sequence fits, and not much more."""
        return max(spec.num_pages for spec in self.specs) + self.spare_pages


specs = st.builds(
    Spec,
    num_prompt_tokens=st.integers(1, 24),
    max_tokens=st.integers(1, 12),
    adapter=st.sampled_from(sorted(ADAPTERS)),
    arrives=st.integers(0, 12),
    order_key=st.integers(0, 5),
    topic=st.integers(0, 2),
)
scenarios = st.builds(
    Scenario,
    specs=st.lists(specs, min_size=1, max_size=8),
    spare_pages=st.integers(0, 4),
    max_step_tokens=st.integers(4, 16),
    max_sequences=st.integers(1, 4),
    fetch_steps=st.integers(0, 5),
    load_steps=st.integers(1, 5),
)


@dataclass
class Fleet:
    """Stands for everything around the batcher: arrivals, fetches, loads, and a model that draws token 0."""

    scenario: Scenario
    step: int = 0
    # adapter -> step
    at_hand: dict[str, int] = field(default_factory=dict)
    loaded_at: dict[str, int] = field(default_factory=dict)
    # what this test knows to be computed of each sequence
    computed: dict[str, int] = field(default_factory=dict)
    preemptions: int = 0
    # tokens that nobody had to compute
    cached: int = 0

    def __post_init__(self) -> None:
        self.memory = MemoryManager(SMALL_PAGES, self.scenario.num_pages)
        self.batcher = Batcher(
            self.memory,
            self.layout,
            max_step_tokens=self.scenario.max_step_tokens,
            max_sequences=self.scenario.max_sequences,
        )

    def layout(self, adapter: str) -> PackedLayout | None:
        here = self.at_hand.get(adapter, self.step + 1) <= self.step
        return layout_of_pages(ADAPTERS[adapter]) if here else None

    def run(self) -> None:
        # Every step computes at least a token, waits for a load, or ends a wait; a preempted sequence starts over.
        total = sum(spec.num_prompt_tokens + spec.max_tokens for spec in self.scenario.specs)
        most = (total + 20) * (len(self.scenario.specs) + 1) * 2
        while list(self.batcher) or self.step <= max(spec.arrives for spec in self.scenario.specs):
            assert self.step < most, "no end in sight"
            self.arrive()
            self.finish_loads()
            before = self.admissible()
            plan = self.batcher.plan(self.step)
            self.check(plan, before)
            self.compute(plan)
            self.memory.check_integrity()
            self.step += 1

    def arrive(self) -> None:
        for index, spec in enumerate(self.scenario.specs):
            if spec.arrives == self.step:
                sequence = waiting_sequence(
                    f"s{index}",
                    spec.num_prompt_tokens,
                    max_tokens=spec.max_tokens,
                    order_key=spec.order_key,
                    adapter_version=spec.adapter,
                    first_token=spec.topic,
                )
                self.batcher.add(sequence)
                self.at_hand.setdefault(spec.adapter, self.step + self.scenario.fetch_steps)

    def finish_loads(self) -> None:
        for adapter in [adapter for adapter, step in self.loaded_at.items() if step <= self.step]:
            del self.loaded_at[adapter]
            self.memory.finish_loading(adapter)
            self.batcher.adapter_loaded(adapter)

    def admissible(self) -> list[Sequence]:
        """Waiting sequences whose adapter is at hand, in order."""
        waiting = [sequence for sequence in self.batcher if sequence.state is SequenceState.WAITING]
        at_hand = [seq for seq in waiting if not seq.adapter_version or self.layout(seq.adapter_version)]
        return sorted(at_hand, key=lambda sequence: (sequence.order_key, sequence.sequence_id))

    def running(self) -> list[Sequence]:
        states = SequenceState.RUNNING, SequenceState.LOADING
        return [sequence for sequence in self.batcher if sequence.state in states]

    def check(self, plan: StepPlan, admissible: list[Sequence]) -> None:
        scenario, running = self.scenario, self.running()
        assert plan.admitted == admissible[: len(plan.admitted)], "admission out of order"
        assert sum(chunk.length for chunk in plan.chunks) <= scenario.max_step_tokens
        loading = sum(sequence.state is SequenceState.LOADING for sequence in running)
        assert len(running) == self.batcher.num_running <= 2 * scenario.max_sequences
        assert len(plan.chunks) <= scenario.max_sequences
        if plan.admitted:
            assert len(running) - loading <= scenario.max_sequences, "admitted though every place is taken"
        if plan.preempted and running:
            spared = max(sequence.order_key for sequence in running)
            assert min(sequence.order_key for sequence in plan.preempted) >= spared, "an older one was preempted"
        for sequence in plan.admitted:
            if sequence.preemptions and sequence in running:
                held = len(self.memory.kv.page_table(sequence.sequence_id))
                assert held >= SMALL_PAGES.pages_for_tokens(sequence.num_tokens), "back with less than its length"
        self.check_oldest(plan, running)
        for adapter in plan.loads:
            assert adapter not in self.loaded_at, "loaded twice"
            self.loaded_at[adapter] = self.step + scenario.load_steps

    def check_oldest(self, plan: StepPlan, running: list[Sequence]) -> None:
        ready = [sequence for sequence in running if sequence.state is SequenceState.RUNNING]
        in_step = {chunk.sequence.sequence_id for chunk in plan.chunks}
        if ready:
            oldest = min(sequence.order_key for sequence in ready)
            assert any(seq.order_key == oldest and seq.sequence_id in in_step for seq in ready), "the oldest stands"

    def compute(self, plan: StepPlan) -> None:
        self.preemptions += len(plan.preempted)
        for sequence in plan.admitted:
            cached = sequence.computed_tokens
            assert cached % PAGE == 0, "a page that is not full was shared"
            assert cached < sequence.num_tokens, "nothing left to draw a token from"
            self.computed[sequence.sequence_id] = cached
            self.cached += cached
        for chunk in plan.chunks:
            sequence = chunk.sequence
            assert chunk.start == self.computed.get(sequence.sequence_id, 0), "a token left out or computed twice"
            assert chunk.length > 0
            self.batcher.launch(chunk)
            self.batcher.complete(chunk)
            self.computed[sequence.sequence_id] = chunk.start + chunk.length
            held = len(self.memory.kv.page_table(sequence.sequence_id))
            assert held >= SMALL_PAGES.pages_for_tokens(sequence.computed_tokens), "KV without a page"
            if chunk.samples:
                sequence.pending_tokens = 0
                sequence.output_token_ids.append(0)
                if len(sequence.output_token_ids) == sequence.stopping.max_tokens:
                    self.batcher.remove(sequence, self.step)
        self.memory.complete(self.step)


@settings(max_examples=400)
@given(scenarios)
def test_everything_finishes_in_order_with_every_token_computed_once(scenario: Scenario) -> None:
    fleet = Fleet(scenario)
    fleet.run()
    counts = fleet.memory.counts()
    assert counts.free + counts.adapters + counts.prefix == counts.total
    assert fleet.memory.evictable_pages == counts.adapters + counts.prefix


def test_the_scenarios_do_preempt() -> None:
    """The smallest scenario of two sequences that collide; without preemption the test above would prove little."""
    pair = [Spec(4, 12, "", 0, order_key, topic=order_key) for order_key in range(2)]
    fleet = Fleet(Scenario(pair, spare_pages=1, max_step_tokens=8, max_sequences=2, fetch_steps=0, load_steps=1))
    fleet.run()
    assert fleet.preemptions == 1


def test_the_scenarios_do_share() -> None:
    """Without a hit the test above would prove little too."""
    pair = [Spec(12, 2, "", arrives, 0) for arrives in (0, 4)]
    fleet = Fleet(Scenario(pair, spare_pages=1, max_step_tokens=16, max_sequences=2, fetch_steps=0, load_steps=1))
    fleet.run()
    assert fleet.cached == 8
