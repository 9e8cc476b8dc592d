"""Who is in the next step, decided with integers alone."""

import pytest

from gpu_worker.batching import Batcher, StepPlan
from gpu_worker.memory.manager import MemoryManager
from gpu_worker.sequence import Sequence, SequenceState
from tests.gpu_worker.support import SMALL_PAGES, layout_of_pages, waiting_sequence

PAGE = SMALL_PAGES.page_size
# adapter -> pages, when its bytes are in the host tier
AT_HAND = {"a": 2, "b": 3}


def new_batcher(num_pages: int = 10, *, max_step_tokens: int = 64, max_sequences: int = 8) -> Batcher:
    memory = MemoryManager(SMALL_PAGES, num_pages)
    return Batcher(
        memory,
        lambda adapter: layout_of_pages(AT_HAND[adapter]) if adapter in AT_HAND else None,
        max_step_tokens=max_step_tokens,
        max_sequences=max_sequences,
    )


def add(batcher: Batcher, name: str, num_tokens: int, order_key: int, adapter: str = "") -> Sequence:
    sequence = waiting_sequence(name, num_tokens, order_key=order_key, adapter_version=adapter)
    batcher.add(sequence)
    return sequence


def compute(plan: StepPlan) -> None:
    """What the engine does with a plan: books the chunks, appends the tokens drawn."""
    for chunk in plan.chunks:
        chunk.sequence.computed_tokens = chunk.sequence.launched_tokens = chunk.start + chunk.length
        if chunk.samples:
            chunk.sequence.output_token_ids.append(0)


def run_step(batcher: Batcher) -> StepPlan:
    plan = batcher.plan(0)
    compute(plan)
    return plan


def lengths(plan: StepPlan) -> dict[str, int]:
    return {chunk.sequence.request_id: chunk.length for chunk in plan.chunks}


def names(sequences: list[Sequence]) -> list[str]:
    return [sequence.request_id for sequence in sequences]


def test_admission_follows_the_order_key_not_the_arrival() -> None:
    batcher = new_batcher()
    for name, order_key in (("late", 9), ("early", 1), ("middle", 5)):
        add(batcher, name, PAGE, order_key)
    assert names(batcher.plan(0).admitted) == ["early", "middle", "late"]


def test_nobody_overtakes_a_sequence_that_does_not_fit() -> None:
    batcher = new_batcher(num_pages=4)
    for name, num_tokens, order_key in (("first", 2 * PAGE, 1), ("large", 3 * PAGE, 2), ("small", 1, 3)):
        add(batcher, name, num_tokens, order_key)
    assert names(batcher.plan(0).admitted) == ["first"]


def test_a_sequence_whose_adapter_is_not_at_hand_holds_up_nobody() -> None:
    batcher = new_batcher()
    add(batcher, "cold", PAGE, 1, adapter="somewhere else")
    add(batcher, "base", PAGE, 2)
    assert names(batcher.plan(0).admitted) == ["base"]


def test_no_more_sequences_than_allowed_hold_pages() -> None:
    batcher = new_batcher(max_sequences=2)
    for order_key in range(3):
        add(batcher, f"s{order_key}", 1, order_key)
    batcher.plan(0)
    assert (batcher.num_running, batcher.num_waiting) == (2, 1)


def test_an_admitted_adapter_is_loaded_once() -> None:
    batcher = new_batcher()
    for order_key in range(3):
        add(batcher, f"s{order_key}", 1, order_key, adapter="a")
    assert batcher.plan(0).loads == ["a"]


def test_a_sequence_waits_for_its_adapter_while_others_run() -> None:
    batcher = new_batcher()
    add(batcher, "loading", 1, 1, adapter="a")
    add(batcher, "base", 1, 2)
    assert lengths(batcher.plan(0)) == {"base": 1}


def test_a_sequence_joins_the_step_after_its_adapter_is_loaded() -> None:
    batcher = new_batcher()
    memory = batcher._memory
    add(batcher, "loading", 1, 1, adapter="a")
    batcher.plan(0)
    memory.finish_loading("a")
    batcher.adapter_loaded("a")
    assert lengths(batcher.plan(0)) == {"loading": 1}


def test_who_waits_for_a_load_takes_no_place_of_a_step() -> None:
    batcher = new_batcher(max_sequences=1)
    add(batcher, "loading", 1, 1, adapter="a")
    add(batcher, "base", 1, 2)
    assert lengths(batcher.plan(0)) == {"base": 1}


def test_twice_as_many_as_a_step_has_places_for_hold_pages_at_most() -> None:
    batcher = new_batcher(max_sequences=1)
    for order_key in range(3):
        add(batcher, f"s{order_key}", 1, order_key, adapter="a")
    assert names(batcher.plan(0).admitted) == ["s0", "s1"]


def test_a_step_has_places_for_the_oldest_when_a_load_makes_one_too_many() -> None:
    batcher = new_batcher(max_sequences=1)
    add(batcher, "loading", 1, 1, adapter="a")
    add(batcher, "base", 1, 2)
    add(batcher, "behind", 1, 3)
    batcher.plan(0)
    batcher._memory.finish_loading("a")
    batcher.adapter_loaded("a")
    plan = batcher.plan(0)
    assert (lengths(plan), batcher.num_running, batcher.num_waiting) == ({"loading": 1}, 2, 1)


def test_a_sequence_of_a_resident_adapter_runs_at_once() -> None:
    batcher = new_batcher()
    add(batcher, "first", 1, 1, adapter="a")
    batcher.plan(0)
    batcher._memory.finish_loading("a")
    add(batcher, "second", 1, 2, adapter="a")
    assert "second" in lengths(batcher.plan(0))


def test_a_long_prompt_runs_in_chunks() -> None:
    batcher = new_batcher(max_step_tokens=8)
    add(batcher, "long", 19, 1)
    assert [lengths(run_step(batcher))["long"] for _ in range(4)] == [8, 8, 3, 1]


def test_only_the_last_chunk_samples() -> None:
    batcher = new_batcher(max_step_tokens=8)
    add(batcher, "long", 12, 1)
    first = batcher.plan(0)
    samples = [chunk.samples for chunk in first.chunks]
    compute(first)
    samples += [chunk.samples for chunk in batcher.plan(0).chunks]
    assert samples == [False, True]


def test_running_sequences_decode_before_a_newcomer_fills_the_step() -> None:
    batcher = new_batcher(max_step_tokens=8)
    add(batcher, "running", 2, 2)
    run_step(batcher)
    add(batcher, "newcomer", 20, 1)
    assert lengths(batcher.plan(0)) == {"running": 1, "newcomer": 7}


def test_the_older_of_two_prompts_gets_the_budget_first() -> None:
    batcher = new_batcher(max_step_tokens=8)
    add(batcher, "younger", 6, 2)
    add(batcher, "older", 6, 1)
    assert lengths(batcher.plan(0)) == {"older": 6, "younger": 2}


def test_the_largest_order_key_is_preempted() -> None:
    batcher = new_batcher(num_pages=3)
    for name, order_key in (("middle", 5), ("young", 9), ("old", 1)):
        add(batcher, name, PAGE, order_key)
    run_step(batcher)
    assert names(batcher.plan(0).preempted) == ["young", "middle"]


def test_the_oldest_goes_on_when_pages_are_short() -> None:
    batcher = new_batcher(num_pages=3)
    for name, order_key in (("middle", 5), ("young", 9), ("old", 1)):
        add(batcher, name, PAGE, order_key)
    run_step(batcher)
    assert lengths(batcher.plan(0)) == {"old": 1}


def test_a_sequence_that_preempts_itself_is_not_in_the_step() -> None:
    batcher = new_batcher(num_pages=2)
    add(batcher, "old", 2, 1)
    add(batcher, "young", PAGE, 2)
    run_step(batcher)
    assert lengths(batcher.plan(0)) == {"old": 1}


def test_a_preempted_sequence_keeps_its_tokens_and_computes_them_anew() -> None:
    batcher = new_batcher()
    sequence = add(batcher, "s", 3, 1)
    run_step(batcher)
    batcher.preempt(sequence, 0)
    assert lengths(batcher.plan(0)) == {"s": 4}


def test_a_preempted_sequence_comes_back_only_with_its_whole_length() -> None:
    batcher = new_batcher(num_pages=3, max_step_tokens=PAGE, max_sequences=2)
    young = add(batcher, "young", 2 * PAGE, 2)
    for _ in range(2):
        run_step(batcher)
    batcher.preempt(young, 0)
    add(batcher, "old", 2 * PAGE, 1)
    # `old` takes a page for its first chunk; the 9 tokens of `young` need all three
    assert names([sequence for _ in range(2) for sequence in run_step(batcher).admitted]) == ["old"]


def test_a_preempted_sequence_waits_at_its_old_place() -> None:
    batcher = new_batcher(max_sequences=1)
    sequence = add(batcher, "old", 1, 1)
    batcher.plan(0)
    add(batcher, "young", 1, 2)
    batcher.preempt(sequence, 0)
    assert names(batcher.plan(0).admitted) == ["old"]


def test_a_smaller_order_key_moves_a_waiting_sequence_forward() -> None:
    batcher = new_batcher()
    add(batcher, "first", 1, 5)
    second = add(batcher, "second", 1, 6)
    batcher.reorder(second, 4)
    assert names(batcher.plan(0).admitted) == ["second", "first"]


def test_an_order_key_never_grows() -> None:
    batcher = new_batcher()
    first = add(batcher, "first", 1, 5)
    add(batcher, "second", 1, 6)
    batcher.reorder(first, 7)
    assert names(batcher.plan(0).admitted) == ["first", "second"]


def test_a_running_sequence_is_spared_after_a_reorder() -> None:
    batcher = new_batcher(num_pages=2)
    add(batcher, "first", PAGE, 1)
    second = add(batcher, "second", PAGE, 2)
    run_step(batcher)
    batcher.reorder(second, 0)
    assert names(batcher.plan(0).preempted) == ["first"]


@pytest.mark.parametrize("steps", [0, 1], ids=["waiting", "running"])
def test_a_removed_sequence_leaves_nothing(steps: int) -> None:
    batcher = new_batcher()
    sequence = add(batcher, "s", 6, 1)
    for _ in range(steps):
        run_step(batcher)
    batcher.remove(sequence, 0)
    assert (list(batcher), batcher.num_waiting, batcher.num_running) == ([], 0, 0)
    assert batcher._memory.counts().free == 10
    assert sequence.state is SequenceState.FINISHED
