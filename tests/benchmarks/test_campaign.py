"""Systems take turns, and an answer that is not PEFT's ends the run."""

import pytest

from benchmarks.serving.campaign import WrongTokensError, order, run_in_rounds
from benchmarks.serving.outcome import Outcome, Tokens

RIGHT: Tokens = ((1, 2, 3), (4, 5))
ONE_WRONG: Tokens = ((1, 2, 3), (4, 6))


def outcome(outputs: Tokens = RIGHT) -> Outcome:
    return Outcome(2.0, outputs, ((0.1, 0.2, 0.5), (0.3, 0.4)), 1)


def expect_right(system: str, number: int) -> Tokens:
    return RIGHT


def never(system: str) -> bool:
    return False


def test_each_round_has_every_system_and_begins_with_another() -> None:
    assert [order(["a", "b", "c"], number) for number in range(3)] == [
        ["a", "b", "c"],
        ["b", "c", "a"],
        ["c", "a", "b"],
    ]


def test_no_system_runs_twice_before_another_has_run() -> None:
    turns: list[tuple[str, int]] = []

    def run(system: str, number: int) -> Outcome:
        turns.append((system, number))
        return outcome()

    results = run_in_rounds(["a", "b"], 3, run, expect_right, never)
    assert turns == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]
    assert {system: len(found.outcomes) for system, found in results.items()} == {"a": 3, "b": 3}


def test_each_round_is_compared_with_its_own_tokens() -> None:
    answers = {0: RIGHT, 1: ONE_WRONG}
    results = run_in_rounds(
        ["a"], 2, lambda system, number: outcome(answers[number]), lambda system, number: answers[number], never
    )
    assert results["a"].wrong == 0


def test_one_wrong_token_in_the_last_round_ends_all() -> None:
    answers = [RIGHT, RIGHT, ONE_WRONG]
    with pytest.raises(WrongTokensError, match=r"a: 1 of 2 answers are not PEFT's in round 2, first that to request 1"):
        run_in_rounds(["a"], 3, lambda system, number: outcome(answers[number]), expect_right, never)


@pytest.mark.parametrize("short", [((1, 2), (4, 5)), ((), (4, 5))])
def test_a_missing_token_is_a_wrong_answer(short: Tokens) -> None:
    with pytest.raises(WrongTokensError):
        run_in_rounds(["a"], 1, lambda system, number: outcome(short), expect_right, never)


def test_a_missing_answer_is_an_error_even_where_tokens_may_differ() -> None:
    with pytest.raises(ValueError, match="1 answers to 2 requests"):
        run_in_rounds(["a"], 1, lambda system, number: outcome(((1, 2, 3),)), expect_right, lambda system: True)


def test_a_peer_may_differ_and_the_worst_round_is_told() -> None:
    answers = [ONE_WRONG, RIGHT]
    results = run_in_rounds(
        ["peer"], 2, lambda system, number: outcome(answers[number]), expect_right, lambda system: True
    )
    assert results["peer"].wrong == 1
