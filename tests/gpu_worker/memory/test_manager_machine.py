"""Any order of calls, with steps in flight: the books balance, and what fits by the numbers is admitted."""

import pytest
from hypothesis import seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.gpu_worker.memory.machine import MemoryMachine

STEPS = 50


def test_the_books_balance_whatever_happens() -> None:
    run_state_machine_as_test(MemoryMachine, settings=settings(max_examples=60, stateful_step_count=STEPS))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", range(8))
def test_the_books_balance_over_a_hundred_thousand_calls(part: int) -> None:
    """Eight parts of 12,500 calls at least."""
    rounds, before = 0, MemoryMachine.calls
    while MemoryMachine.calls < before + 12_500:
        machine = seed(100 * part + rounds)(MemoryMachine)
        run_state_machine_as_test(machine, settings=settings(max_examples=150, stateful_step_count=STEPS))
        rounds += 1
