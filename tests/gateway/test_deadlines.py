"""When a call that was cut off counts as out of time."""

import pytest

from gateway.deadlines import has_passed


@pytest.mark.parametrize(
    ("remaining", "timeout", "passed"),
    [
        pytest.param(0.0, 10.0, True, id="the server's own clock"),
        pytest.param(0.04, 0.2, True, id="the client's clock"),
        pytest.param(0.9, 100.0, True, id="rounded up on its way"),
        pytest.param(0.3, 2.0, True, id="late at a loaded server"),
        pytest.param(5.0, 10.0, False, id="half way"),
        pytest.param(None, None, False, id="no deadline"),
    ],
)
def test_a_deadline_has_passed(remaining: float | None, timeout: float | None, passed: bool) -> None:
    assert has_passed(remaining, timeout) is passed
