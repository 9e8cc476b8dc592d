"""The sampler draws from the distribution that transformers' logits processors describe."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gpu_worker.logit_changes import changes
from gpu_worker.logprobs import describe
from gpu_worker.sampler import Filters, plan
from gpu_worker.sequence import SamplingParams, Sequence, StoppingParams

VOCAB_SIZE = 50
NUM_DRAWS = 20_000
# The two likeliest tokens of `random_logits`: what penalises them moves most of the probability.
OUTPUT = (16, 42, 16)
# 0.1 % of right samplers would exceed the critical value with random seeds; the seeds here are fixed.
Z_SCORE = 3.09

PLAIN = SamplingParams(temperature=1.0, seed=0)
CASES = {
    "temperature": replace(PLAIN, temperature=0.7),
    "hot": replace(PLAIN, temperature=1.8),
    "top-k": replace(PLAIN, top_k=5),
    "top-p": replace(PLAIN, top_p=0.8),
    "min-p": replace(PLAIN, min_p=0.1),
    "repetition": replace(PLAIN, repetition_penalty=1.4),
    "presence-frequency": replace(PLAIN, presence_penalty=0.8, frequency_penalty=0.5),
    "bias": replace(PLAIN, logit_bias=((0, 2.0), (16, -1.5), (42, -100.0))),
    "all": SamplingParams(
        temperature=1.3,
        seed=0,
        top_k=20,
        top_p=0.9,
        min_p=0.05,
        repetition_penalty=1.2,
        presence_penalty=-0.3,
        frequency_penalty=0.2,
        logit_bias=((4, 1.0),),
    ),
}


def sequence_of(params: SamplingParams, output: tuple[int, ...] = OUTPUT, **stopping: object) -> Sequence:
    stops = {"max_tokens": 100, "min_tokens": 0, "stop_token_ids": frozenset(), **stopping}
    return Sequence(
        request_id="request",
        attempt=0,
        tenant="default",
        gateway_id="gateway",
        order_key=0,
        prompt_token_ids=[3, 7, 7, 11],
        output_token_ids=list(output),
        num_delivered=0,
        sampling=params,
        stopping=StoppingParams(**stops),  # type: ignore[arg-type]  # the tests' own keyword arguments
    )


def random_logits(rows: int = 1) -> torch.Tensor:
    return 3 * torch.randn(rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(5))


def oracle(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Probabilities `[vocab_size]` as transformers computes them, in its order; it has no penalties by count."""
    ids = [*sequence_of(params).prompt_token_ids, *OUTPUT]
    scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(torch.tensor([ids]), logits.double())
    for token in set(OUTPUT):
        scores[0, token] -= params.presence_penalty + params.frequency_penalty * OUTPUT.count(token)
    for token, bias in params.logit_bias:
        scores[0, token] += bias
    processors = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        processors.append(MinPLogitsWarper(params.min_p))
    return torch.softmax(processors(torch.tensor([ids]), scores), dim=-1)[0]


def chi_square(observed: Counter[int], probabilities: torch.Tensor) -> tuple[float, float]:
    """The statistic over tokens expected at least five times, the rest pooled; and its critical value."""
    expected = (probabilities * NUM_DRAWS).tolist()
    common = [token for token, count in enumerate(expected) if count >= 5]
    cells = [(observed[token], expected[token]) for token in common]
    rare = sum(expected) - sum(count for _, count in cells)
    if rare > 0.5:
        cells.append((NUM_DRAWS - sum(count for count, _ in cells), rare))
    statistic = sum((seen - count) ** 2 / count for seen, count in cells)
    freedom = len(cells) - 1
    # Wilson and Hilferty's approximation of the quantile (1931)
    critical = freedom * (1 - 2 / (9 * freedom) + Z_SCORE * (2 / (9 * freedom)) ** 0.5) ** 3
    return statistic, critical


def sample(logits: torch.Tensor, sequences: list[Sequence]) -> list[int]:
    tokens: list[int] = plan(sequences, VOCAB_SIZE).draw(logits).token_ids.tolist()
    return tokens


def drawn(params: SamplingParams, num_draws: int = NUM_DRAWS, chunk: int = 500) -> Counter[int]:
    """Draws with seeds 0, 1, 2, ..., many rows at a time."""
    logits, tokens = random_logits(), Counter[int]()
    for start in range(0, num_draws, chunk):
        rows = [sequence_of(replace(params, seed=seed)) for seed in range(start, start + chunk)]
        tokens.update(sample(logits.expand(chunk, -1), rows))
    return tokens


@pytest.mark.parametrize("params", CASES.values(), ids=CASES)
def test_20000_draws_follow_the_oracles_distribution(params: SamplingParams) -> None:
    statistic, critical = chi_square(drawn(params), oracle(random_logits(), params))
    assert statistic < critical


@pytest.fixture(scope="module")
def drawn_plainly() -> Counter[int]:
    return drawn(PLAIN)


@pytest.mark.parametrize("params", CASES.values(), ids=CASES)
def test_control_ignored_parameters_are_noticed(params: SamplingParams, drawn_plainly: Counter[int]) -> None:
    statistic, critical = chi_square(drawn_plainly, oracle(random_logits(), params))
    assert statistic > critical


def test_control_a_temperature_that_is_a_tenth_off_is_noticed() -> None:
    statistic, critical = chi_square(drawn(replace(PLAIN, temperature=1.1)), oracle(random_logits(), PLAIN))
    assert statistic > critical


@pytest.mark.parametrize("params", CASES.values(), ids=CASES)
def test_no_token_is_drawn_that_the_oracle_excludes(params: SamplingParams) -> None:
    possible = oracle(random_logits(), params) > 0
    assert all(possible[token] for token in drawn(params, 2_000))


def test_filtered_probabilities_equal_the_oracles() -> None:
    params = replace(PLAIN, temperature=1.3, top_k=20, top_p=0.9, min_p=0.05)
    logits = random_logits()
    probabilities, order = Filters.of([params], VOCAB_SIZE).apply(logits.double() / params.temperature)
    by_token = torch.zeros(VOCAB_SIZE, dtype=torch.float64).scatter(0, order[0], probabilities[0])
    torch.testing.assert_close(by_token, oracle(logits, params))


@pytest.mark.parametrize("params", CASES.values(), ids=CASES)
def test_a_row_draws_the_same_alone_and_in_a_mixed_crowd(params: SamplingParams) -> None:
    logits = random_logits(rows=len(CASES) * 4)
    crowd = [sequence_of(replace(case, seed=seed)) for seed in range(4) for case in CASES.values()]
    together = sample(logits, crowd)
    alone = [sample(logits[row : row + 1], [crowd[row]])[0] for row in range(len(crowd))]
    assert together == alone


def test_presence_and_frequency_penalties_count_generated_tokens_only() -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    params = SamplingParams(temperature=0.0, seed=0, presence_penalty=0.5, frequency_penalty=0.25, logprobs=0)
    logits[0, 3], logits[0, 9], logits[0, 20] = 1.0, 1.9, 1.2
    # 9 was generated three times: 1.9 - 0.5 - 0.75 = 0.65; 3 is in the prompt only; 20 was generated once: 0.45
    assert sample(logits, [sequence_of(params, (9, 9, 9, 20))])[0] == 3


def test_a_logit_bias_moves_a_token() -> None:
    params = SamplingParams(temperature=0.0, seed=0, logit_bias=((4, 100.0),))
    assert sample(random_logits(), [sequence_of(params)])[0] == 4


def test_no_stop_token_is_drawn_before_min_tokens() -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 2] = 9.0
    params = SamplingParams(temperature=0.0, seed=0)
    stops = {"min_tokens": 2, "stop_token_ids": frozenset({2})}
    assert sample(logits, [sequence_of(params, (5,), **stops)])[0] != 2
    assert sample(logits, [sequence_of(params, (5, 6), **stops)])[0] == 2


def test_logprobs_are_those_of_the_model() -> None:
    logits = random_logits()
    (described,) = describe(logits, torch.tensor([7]), 3).read([3])
    expected = torch.log_softmax(logits[0], dim=-1)
    assert described.token_id == 7
    assert described.logprob == pytest.approx(float(expected[7]))
    best = expected.topk(3)
    assert [token for token, _ in described.top] == best.indices.tolist()
    assert [logprob for _, logprob in described.top] == pytest.approx(best.values.tolist())


def test_logprobs_of_zero_alternatives_are_the_chosen_token_alone() -> None:
    one, none = describe(random_logits(2), torch.tensor([7, 8]), 1).read([1, 0])
    assert (len(one.top), none.token_id, none.top) == (1, 8, ())


CHANGED = {
    "repetition": replace(PLAIN, temperature=0.0, repetition_penalty=1.4),
    "presence": replace(PLAIN, temperature=0.0, presence_penalty=1.5),
    "frequency": replace(PLAIN, temperature=0.7, frequency_penalty=0.9),
    "all": replace(PLAIN, frequency_penalty=-0.7, presence_penalty=0.4, repetition_penalty=1.2, logit_bias=((9, 2.0),)),
    "none": PLAIN,
}


@pytest.mark.parametrize("last", [3, 9, 20], ids=["in-the-prompt", "generated-before", "new"])
def test_a_token_that_only_the_device_knows_counts_as_any_other(last: int) -> None:
    """Whatever the row: the same logits, bit for bit, as when the host knows the token."""
    logits = random_logits(len(CHANGED))
    known = [sequence_of(params, (9, 9, 5, last)) for params in CHANGED.values()]
    unknown = [sequence_of(params, (9, 9, 5)) for params in CHANGED.values()]
    for sequence in unknown:
        sequence.pending_tokens = 1
    told, untold = changes(known, VOCAB_SIZE), changes(unknown, VOCAB_SIZE)
    assert told is not None
    assert untold is not None
    pending = torch.full((len(CHANGED), 1), last)
    adjusted = untold.apply(logits, pending)
    assert torch.equal(adjusted, told.apply(logits, None))
    assert not torch.equal(adjusted, untold.apply(logits, None)), "the token makes no difference"
    assert plan(unknown, VOCAB_SIZE).draw(logits, pending).token_ids.tolist() == sample(logits, known)


def test_a_row_without_such_a_token_is_left_alone() -> None:
    logits, sequence = random_logits(), sequence_of(CHANGED["all"], (9, 9, 5))
    table = changes([sequence], VOCAB_SIZE)
    assert table is not None
    assert torch.equal(table.apply(logits, torch.tensor([[VOCAB_SIZE]])), table.apply(logits, None))
