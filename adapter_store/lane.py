"""Work beside the thread that gives it: hashing, measuring and syncing take time in which others can go on."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

# What is given holds weights in memory: so many pieces wait at most.
_BACKLOG = 2


class Lane:
    """One thread that does what it is given, in order. An error of a job comes out of a later call."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1)
        self._jobs: deque[Future[None]] = deque()

    def give(self, job: Callable[[], None]) -> None:
        """Returns at once, or when the lane has caught up."""
        if len(self._jobs) == _BACKLOG:
            self._jobs.popleft().result()
        self._jobs.append(self._executor.submit(job))

    def finish(self) -> None:
        """Waits for every job."""
        while self._jobs:
            self._jobs.popleft().result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Forgets the jobs that have not begun, and waits for the one that has."""
        self._executor.shutdown(cancel_futures=True)
