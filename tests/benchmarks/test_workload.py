"""Workload W is the same everywhere: the published token counts, and nothing drawn by chance."""

import pytest

from benchmarks.serving.workload import (
    BASE,
    BFLOAT16,
    NUM_REQUESTS,
    all_on_one,
    each_its_own,
    named,
    power_law,
    with_other_prompts,
)

VOCAB = 2048


@pytest.mark.parametrize("vocab", [2048, 8192])
@pytest.mark.parametrize(
    ("adapters", "prompt_tokens", "output_tokens", "distinct"),
    [(1, 4483, 2649, 1), (8, 4755, 2597, 8), (64, 5045, 2573, 25), (256, 4756, 2408, 36)],
)
def test_w_has_its_published_token_counts(
    adapters: int, prompt_tokens: int, output_tokens: int, distinct: int, vocab: int
) -> None:
    workload = power_law(adapters, vocab)
    assert (workload.prompt_tokens, workload.output_tokens, workload.distinct) == (
        prompt_tokens,
        output_tokens,
        distinct,
    )


def test_the_same_workload_comes_twice_and_another_seed_gives_another() -> None:
    assert power_law(8, VOCAB) == power_law(8, VOCAB)
    assert power_law(8, VOCAB) != power_law(8, VOCAB, seed=1)


def test_lengths_and_tokens_are_in_their_ranges() -> None:
    requests = power_law(64, VOCAB).requests
    assert len(requests) == NUM_REQUESTS
    assert all(16 <= len(request.prompt) <= 128 and 16 <= request.output_tokens <= 64 for request in requests)
    assert all(3 <= token < VOCAB for request in requests for token in request.prompt)


def test_the_first_adapter_is_the_most_asked_for() -> None:
    adapters = [request.adapter for request in power_law(8, VOCAB).requests]
    assert adapters.count(0) > adapters.count(3) > 0


def test_distinct_and_one_differ_in_nothing_but_the_adapters() -> None:
    distinct, one = each_its_own(VOCAB), all_on_one(VOCAB, 2)
    assert [(r.prompt, r.output_tokens) for r in distinct.requests] == [
        (r.prompt, r.output_tokens) for r in one.requests
    ]
    assert (distinct.distinct, one.distinct) == (NUM_REQUESTS, 1)


def test_adapters_in_bfloat16_are_others_and_nothing_else_is() -> None:
    distinct, narrow = (with_other_prompts(named(name, VOCAB), VOCAB, 2) for name in ("distinct", "distinct-bf16"))
    assert [(r.adapter + BFLOAT16, r.prompt, r.output_tokens) for r in distinct.requests] == [
        (r.adapter, r.prompt, r.output_tokens) for r in narrow.requests
    ]


def test_the_base_workload_asks_for_no_adapter() -> None:
    base = power_law(8, VOCAB).of_base()
    assert (base.distinct, {request.adapter for request in base.requests}) == (0, {BASE})
    assert base.output_tokens == power_law(8, VOCAB).output_tokens


def test_workloads_have_names() -> None:
    assert named("n64", VOCAB) == power_law(64, VOCAB)
    assert named("distinct", VOCAB) == each_its_own(VOCAB)


@pytest.mark.parametrize("name", ["n0", "64", "nine", ""])
def test_an_unknown_workload_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match="known: n1, n8"):
        named(name, VOCAB)


def test_other_prompts_change_the_tokens_and_nothing_else() -> None:
    workload = power_law(8, VOCAB)
    first, again, second = (with_other_prompts(workload, VOCAB, variant) for variant in (1, 1, 2))
    assert first == again
    assert len({workload, first, second}) == 3
    for other in (first, second):
        assert [(r.adapter, len(r.prompt), r.output_tokens) for r in other.requests] == [
            (r.adapter, len(r.prompt), r.output_tokens) for r in workload.requests
        ]
    assert not {request.prompt for request in first.requests} & {request.prompt for request in workload.requests}


def test_variant_0_is_the_published_workload() -> None:
    assert with_other_prompts(power_law(8, VOCAB), VOCAB, 0) == power_law(8, VOCAB)
