"""The engine's state belongs to its thread; while that one only computes, another thread may use it."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

_MAX_DUE = 64


class Loan:
    """A lock that its owner gives away for a while: `with loan:` owns, `with loan.lend():` inside lends."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Thread that owns; 0 = none.
        self._owner = 0
        self._lent = False
        # What came while nothing was lent; the oldest are dropped where an owner does not lend for long.
        self._due: deque[Callable[[], None]] = deque(maxlen=_MAX_DUE)

    def __enter__(self) -> None:
        self._lock.acquire()
        self._owner = threading.get_ident()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._owner = 0
        self._lock.release()

    @contextmanager
    def lend(self) -> Iterator[None]:
        """Inside, the owner touches nothing and others may borrow; does nothing on another thread, or while it is lent.

        Those who came too early are served first. Its end waits for whoever borrows at that moment.
        """
        if self._owner != threading.get_ident() or self._lent:
            yield
            return
        while self._due:
            self._due.popleft()()
        self._lent = True
        self._lock.release()
        try:
            yield
        finally:
            self._lock.acquire()
            self._lent = False

    def borrow(self, use: Callable[[], None]) -> bool:
        """Calls `use` when the state is lent just now, and says whether it was; else the owner does when it lends next.

        Does not wait for the owner.
        """
        if self._lock.acquire(blocking=False):
            try:
                if self._lent:
                    use()
                    return True
            finally:
                self._lock.release()
        self._due.append(use)
        return False
