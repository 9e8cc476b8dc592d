"""Any order of calls, with steps in flight: the books balance, and what fits by the numbers is admitted."""

import pytest
from hypothesis import seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.gpu_worker.memory.machine import MemoryMachine

STEPS = 50


def test_the_books_balance_whatever_happens() -> None:
    run_state_machine_as_test(MemoryMachine, settings=settings(max_examples=60, stateful_step_count=STEPS))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_the_books_balance_over_a_hundred_thousand_calls(part: int) -> None:
    """Four parts of 25,000 calls at least."""
    rounds, before = 0, MemoryMachine.calls
    while MemoryMachine.calls < before + 25_000:
        machine = seed(100 * part + rounds)(MemoryMachine)
        run_state_machine_as_test(machine, settings=settings(max_examples=300, stateful_step_count=STEPS))
        rounds += 1
