"""Who runs when: the systems take turns, so that a disturbance meets all of them. No processes here."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from benchmarks.serving.outcome import Outcome, Tokens, differing


class WrongTokensError(Exception):
    """A system answered something else than PEFT: its speed means nothing."""


def turns(systems: Sequence[str], runs: int) -> Iterator[str]:
    """Every system once a round; each round begins with another one."""
    for number in range(runs):
        start = number % len(systems)
        yield from (*systems[start:], *systems[:start])


@dataclass(slots=True)
class Results:
    """Outcomes of one workload by system, in the order they came, and how many answers were not PEFT's."""

    outcomes: dict[str, list[Outcome]] = field(default_factory=dict)
    wrong: dict[str, int] = field(default_factory=dict)


def run_in_turns(
    systems: Sequence[str],
    runs: int,
    run: Callable[[str], Outcome],
    expected: Callable[[str], Tokens],
    may_differ: Callable[[str], bool],
) -> Results:
    """Runs each system `runs` times and compares every answer with `expected(system)`.

    Raises WrongTokensError at the first answer that is not PEFT's, unless the system `may_differ`.
    """
    results = Results({system: [] for system in systems}, dict.fromkeys(systems, 0))
    for system in turns(systems, runs):
        outcome = run(system)
        check(system, outcome, expected(system), results, may_differ(system))
        results.outcomes[system].append(outcome)
    return results


def check(system: str, outcome: Outcome, expected: Tokens, results: Results, may_differ: bool) -> None:
    wrong = differing(outcome.outputs, expected)
    results.wrong[system] = max(results.wrong.get(system, 0), len(wrong))
    if wrong and not may_differ:
        raise WrongTokensError(f"{system}: {len(wrong)} of {len(expected)} answers are not PEFT's, first {wrong[0]}")
