"""The peak page estimate against a step-by-step simulation."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.core.pages import peak_pages
from tests.scheduler.core_fakes import simulated_peak

SEQUENCES = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 60)), max_size=12)


@given(SEQUENCES, st.sampled_from([1, 2, 3, 4, 7, 16]))
def test_the_peak_is_that_of_a_simulation(sequences: list[tuple[int, int]], page_size: int) -> None:
    assert peak_pages(sequences, page_size) == simulated_peak(sequences, page_size)


@pytest.mark.parametrize(
    ("sequences", "pages"),
    [
        pytest.param([], 0, id="nothing"),
        pytest.param([(1, 0)], 1, id="one token"),
        pytest.param([(16, 0)], 1, id="a full page"),
        pytest.param([(16, 1)], 2, id="one token more"),
        # The short one ends at step 4: 20 + 104 tokens in 2 + 7 pages; then the long one grows alone to 200.
        pytest.param([(16, 4), (100, 100)], 13, id="the long one alone"),
        # Both end together: 2 * ceil(33 / 16).
        pytest.param([(17, 16), (17, 16)], 6, id="two equal"),
        # At step 1: 101 + 11 tokens in 7 + 1 pages; at step 50 the second alone has 60 in 4.
        pytest.param([(100, 1), (10, 50)], 8, id="the short one at its end"),
    ],
)
def test_known_peaks(sequences: list[tuple[int, int]], pages: int) -> None:
    assert peak_pages(sequences, 16) == pages
