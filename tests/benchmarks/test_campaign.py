"""Systems take turns, and an answer that is not PEFT's ends the run."""

import pytest

from benchmarks.serving.campaign import Results, WrongTokensError, check, run_in_turns, turns
from benchmarks.serving.outcome import Outcome, Tokens

RIGHT: Tokens = ((1, 2, 3), (4, 5))


def outcome(outputs: Tokens = RIGHT) -> Outcome:
    return Outcome(2.0, outputs, ((0.1, 0.2, 0.5), (0.3, 0.4)), 1)


def test_each_round_has_every_system_and_begins_with_another() -> None:
    assert list(turns(["a", "b", "c"], 3)) == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]


def test_no_system_runs_twice_before_another_has_run() -> None:
    order: list[str] = []

    def run(system: str) -> Outcome:
        order.append(system)
        return outcome()

    results = run_in_turns(["a", "b"], 4, run, lambda system: RIGHT, lambda system: False)
    assert order == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert {system: len(found) for system, found in results.outcomes.items()} == {"a": 4, "b": 4}


def test_one_wrong_token_in_the_last_run_ends_all() -> None:
    answers = iter([RIGHT, RIGHT, ((1, 2, 3), (4, 6))])
    with pytest.raises(WrongTokensError, match=r"a: 1 of 2 answers are not PEFT's, first 1"):
        run_in_turns(["a"], 3, lambda system: outcome(next(answers)), lambda system: RIGHT, lambda system: False)


def test_a_missing_token_is_a_wrong_answer_and_a_missing_answer_an_error() -> None:
    with pytest.raises(WrongTokensError):
        check("a", outcome(((1, 2), (4, 5))), RIGHT, Results(), False)
    with pytest.raises(ValueError, match="1 answers to 2 requests"):
        check("a", outcome(((1, 2, 3),)), RIGHT, Results(), False)


def test_a_peer_may_differ_and_that_is_counted() -> None:
    results = run_in_turns(
        ["peer"], 2, lambda system: outcome(((1, 2, 3), (9, 9))), lambda system: RIGHT, lambda system: True
    )
    assert results.wrong == {"peer": 1}
