"""Whether a call that was cut off had run out of time."""

# A client cancels when its own clock says so, the transport rounds the time it tells the server up by as much as a
# hundredth, and a call reaches a loaded server late: at the client's deadline the server believes that time is left.
SLACK_SECONDS = 0.25
ROUNDING = 0.05


def has_passed(remaining_seconds: float | None, timeout_seconds: float | None) -> bool:
    """`timeout_seconds` is what remained at the start; None means no deadline."""
    if remaining_seconds is None or timeout_seconds is None:
        return False
    return remaining_seconds <= SLACK_SECONDS + ROUNDING * timeout_seconds
