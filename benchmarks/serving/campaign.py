"""Who runs when: the systems take turns, so that a disturbance meets all of them. No processes here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.serving.outcome import Outcome, Tokens, differing


class WrongTokensError(Exception):
    """A system answered something else than PEFT: its speed means nothing."""


@dataclass(frozen=True, slots=True)
class Results:
    """Outcomes of one system in the order they came, and how many of its answers were not PEFT's in the worst run."""

    outcomes: tuple[Outcome, ...]
    wrong: int


def order(systems: Sequence[str], number: int) -> list[str]:
    """Every system once; each round begins with another one."""
    start = number % len(systems)
    return [*systems[start:], *systems[:start]]


def run_in_rounds(
    systems: Sequence[str],
    rounds: int,
    run: Callable[[str, int], Outcome],
    expected: Callable[[str, int], Tokens],
    may_differ: Callable[[str], bool],
) -> dict[str, Results]:
    """Runs each system once a round; after the round compares its tokens with `expected(system, round)`.

    Raises WrongTokensError at the first round with an answer that is not PEFT's, unless the system `may_differ`.
    """
    found: dict[str, list[Outcome]] = {system: [] for system in systems}
    wrong = dict.fromkeys(systems, 0)
    for number in range(rounds):
        for system in order(systems, number):
            found[system].append(run(system, number))
        for system in systems:
            answers = expected(system, number)
            others = differing(found[system][-1].outputs, answers)
            wrong[system] = max(wrong[system], len(others))
            if others and not may_differ(system):
                counts = f"{len(others)} of {len(answers)} answers are not PEFT's"
                raise WrongTokensError(f"{system}: {counts} in round {number}, first that to request {others[0]}")
    return {system: Results(tuple(found[system]), wrong[system]) for system in systems}
