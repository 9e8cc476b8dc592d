"""What time it is for the core: what it was told with the last event."""


class Clock:
    """Seconds on the caller's clock. Whoever needs the time of the event that is being taken in looks here."""

    def __init__(self, now: float) -> None:
        self.now = now
