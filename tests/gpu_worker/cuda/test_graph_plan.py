"""Buckets, capacities and lazy recapture, as integers."""

import pytest

from gpu_worker.cuda.graph_plan import Ceilings, GraphKey, GraphPlanner, StepFacts, grown, token_buckets


def decode(tokens: int, *, adapters: int = 0, lora_rank: int = 8, pages: int = 3, table_pages: int = 10) -> StepFacts:
    return StepFacts(tokens, table_pages, True, adapters, lora_rank if adapters else 0, pages if adapters else 0)


@pytest.mark.parametrize("max_tokens", [1, 3, 8, 9, 16, 17, 100, 256, 1000])
def test_buckets_waste_little_and_end_at_the_largest_step(max_tokens: int) -> None:
    buckets = token_buckets(max_tokens)
    assert buckets[-1] == max_tokens
    assert list(buckets) == sorted(set(buckets))
    for tokens in range(1, max_tokens + 1):
        size = next(bucket for bucket in buckets if bucket >= tokens)
        assert size - tokens < max(2, size // 2 + 1) if tokens < 8 else size - tokens <= max(8, size // 4)


def test_few_buckets_are_enough_for_many_sequences() -> None:
    assert len(token_buckets(256)) <= 20


def test_room_grows_by_doubling() -> None:
    assert [grown(amount, 16) for amount in (1, 16, 17, 64, 65)] == [16, 16, 32, 64, 128]


def test_a_graph_is_captured_once_and_replayed_by_every_step_of_its_bucket() -> None:
    planner = GraphPlanner(16)
    first, second = planner.plan(decode(3)), planner.plan(decode(4))
    assert first.key == second.key == GraphKey(4, 64, has_lora=False)
    assert (first.must_capture, second.must_capture) == (True, False)


def test_base_only_and_lora_have_their_own_graphs() -> None:
    planner = GraphPlanner(16)
    assert planner.plan(decode(4)).key != planner.plan(decode(4, adapters=1)).key
    assert not planner.plan(decode(4)).must_capture


def test_a_prompt_runs_eagerly() -> None:
    planner = GraphPlanner(16)
    assert planner.plan(StepFacts(4, 10, decode_only=False)).key is None
    assert planner.plan(decode(17)).key is None


def test_longer_contexts_take_a_wider_graph() -> None:
    planner = GraphPlanner(16)
    planner.plan(decode(4))
    wide = planner.plan(decode(4, table_pages=65))
    assert (wide.key, wide.must_capture) == (GraphKey(4, 128, has_lora=False), True)
    assert not planner.plan(decode(4)).must_capture


def test_a_larger_rank_outgrows_the_lora_graphs_and_no_other() -> None:
    planner = GraphPlanner(16)
    planner.plan(decode(4))
    small = [planner.plan(decode(tokens, adapters=1)).key for tokens in (4, 8)]
    plan = planner.plan(decode(4, adapters=1, lora_rank=64))
    assert set(plan.outgrown) == set(small)
    assert plan.must_capture
    assert planner.ceilings.lora_rank == 64
    # the other bucket is captured again when a step needs it, not before
    assert planner.plan(decode(8, adapters=1)).must_capture
    assert not planner.plan(decode(4)).must_capture


@pytest.mark.parametrize("lora_rank", [1, 8, 16])
def test_a_smaller_rank_needs_no_new_graph(lora_rank: int) -> None:
    planner = GraphPlanner(16)
    planner.plan(decode(4, adapters=2, lora_rank=16))
    assert not planner.plan(decode(4, adapters=3, lora_rank=lora_rank, pages=1)).must_capture


def test_ever_larger_ranks_recapture_a_few_times_only() -> None:
    planner = GraphPlanner(16)
    plans = [planner.plan(decode(4, adapters=1, lora_rank=rank)) for rank in range(1, 257)]
    assert sum(plan.must_capture for plan in plans) == 5  # 16, 32, 64, 128, 256


def test_more_pages_of_an_adapter_raise_the_ceiling_too() -> None:
    assert not Ceilings(16, 2).hold(decode(4, adapters=1, pages=3))
    assert Ceilings(16, 2).raised(decode(4, adapters=1, pages=3)) == Ceilings(16, 4)
