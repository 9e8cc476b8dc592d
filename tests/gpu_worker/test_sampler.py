"""The next token is a pure function of (logits, params, seed, position)."""

from collections.abc import Iterable, Sequence
from typing import cast

import numpy as np
import pytest
import torch

from gpu_worker.sampler import plan, uniform
from gpu_worker.sequence import SamplingParams
from tests.gpu_worker.support import waiting_sequence

GREEDY = SamplingParams(temperature=0.0, seed=0)


def random_logits(num_rows: int, vocab_size: int = 50) -> torch.Tensor:
    return 2 * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(1))


def draw(logits: torch.Tensor, params: Sequence[SamplingParams], positions: Iterable[int]) -> list[int]:
    """Tokens of sequences whose next token is at `positions`."""
    sequences = [waiting_sequence("s", 1) for _ in params]
    for sequence, param, position in zip(sequences, params, positions, strict=True):
        sequence.sampling = param
        # Only its length is read; twenty thousand lists would take gigabytes.
        sequence.prompt_token_ids = cast("list[int]", range(position))
    drawn = plan(sequences, logits.shape[1]).draw(logits)
    return [int(token) for token in drawn.token_ids]


def test_greedy_takes_the_largest_logit() -> None:
    assert draw(torch.tensor([[0.0, 3.0, 1.0]]), [GREEDY], [0]) == [1]


def test_a_greedy_tie_goes_to_the_lowest_id() -> None:
    logits = torch.zeros(1, 4096)
    logits[0, [17, 1000, 4095]] = 5.0
    assert draw(logits, [GREEDY], [0]) == [17]


def test_a_token_is_the_same_alone_and_in_a_crowd() -> None:
    logits = random_logits(64)
    params = [SamplingParams(0.9, seed) for seed in range(64)]
    alone = [draw(logits[row : row + 1], [params[row]], [row + 5])[0] for row in range(64)]
    assert draw(logits, params, range(5, 69)) == alone


def test_greedy_rows_are_untouched_by_random_neighbours() -> None:
    logits = random_logits(4)
    params = [GREEDY, SamplingParams(2.0, 1), GREEDY, SamplingParams(2.0, 2)]
    expected = logits.argmax(dim=-1).tolist()
    tokens = draw(logits, params, [1, 2, 3, 4])
    assert [tokens[0], tokens[2]] == [expected[0], expected[2]]


def test_another_position_is_another_draw() -> None:
    assert len({uniform(7, position) for position in range(1000)}) == 1000


def test_another_seed_is_another_draw() -> None:
    assert len({uniform(seed, 7) for seed in range(1000)}) == 1000


@pytest.mark.parametrize("seed", [0, 2**63, 2**64 - 1])
def test_every_seed_of_the_wire_is_served(seed: int) -> None:
    assert 0 <= uniform(seed, 2**31) < 1


def test_a_token_of_no_probability_is_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(500, -1)
    tokens = draw(logits, [SamplingParams(1.0, 3)] * 500, range(500))
    assert set(tokens) == {1, 3}


def test_a_small_temperature_is_nearly_greedy() -> None:
    logits = random_logits(20)
    assert draw(logits, [SamplingParams(1e-4, 3)] * 20, range(20)) == logits.argmax(dim=-1).tolist()


@pytest.mark.parametrize("keyed_by", ["position", "seed"])
def test_draws_follow_the_softmax(keyed_by: str) -> None:
    num_draws, vocab_size, temperature = 20_000, 12, 0.7
    logits = random_logits(1, vocab_size)
    if keyed_by == "position":
        params, positions = [SamplingParams(temperature, 11)] * num_draws, list(range(num_draws))
    else:
        params, positions = [SamplingParams(temperature, seed) for seed in range(num_draws)], [9] * num_draws
    drawn = np.bincount(draw(logits.expand(num_draws, -1), params, positions), minlength=vocab_size)
    expected = num_draws * torch.softmax(logits[0].double() / temperature, dim=-1).numpy()
    chi_square = float(((drawn - expected) ** 2 / expected).sum())
    # 11 degrees of freedom: 31.3 is exceeded once in a thousand times
    assert chi_square < 31.3
