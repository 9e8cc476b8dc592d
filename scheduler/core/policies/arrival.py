"""Policies that look at nothing but arrivals: first come first served, last come first served, and early abort's."""

from scheduler.core.lazy_heap import Place
from scheduler.core.model import Request
from scheduler.core.policies.protocol import LaneName, Unmetered

# Weight of the newest value in the moving averages of S-LoRA's `AbortReqQueue`.
_NEWEST = 0.7


class FirstCome(Unmetered):
    """The oldest goes first. All requests of a line are in one lane; a higher priority goes before a lower one."""

    def lane_of(self, request: Request) -> LaneName:
        return "", ""

    def request_place(self, request: Request) -> Place:
        return -request.priority, request.number

    def lane_place(self, name: LaneName, head: Request) -> Place:
        return ()

    def group_place(self, group: str, head: Request) -> Place:
        return ()


class LastCome(FirstCome):
    """The newest goes first: under overload some are served in time and the others never."""

    def request_place(self, request: Request) -> Place:
        return -request.priority, -request.number

    def wait_seconds(self, request: Request, line_seconds: float, own_seconds: float) -> float:
        return 0.0


class EarlyAbort(FirstCome):
    """S-LoRA's answer to overload (Sheng et al. 2023, appendix B): newest first while more arrives than is admitted.

    R1 and R2 are moving averages of the requests that arrive and that are admitted in a round. What can no longer meet
    its objective is refused by `deadlines.py`. Priorities do not count.
    """

    reversible = True

    def __init__(self) -> None:
        self.arriving = 1
        self.admitted = 1
        # Queued requests after the last round that admitted some.
        self._left = 0

    @property
    def newest_first(self) -> bool:
        return self.arriving > self.admitted

    def request_place(self, request: Request) -> Place:
        return (request.number,)

    def round_begins(self, num_queued: int) -> None:
        self.arriving = int(_NEWEST * (num_queued - self._left) + (1 - _NEWEST) * self.arriving)

    def round_ends(self, num_offered: int, num_queued: int) -> None:
        if num_offered:
            self.admitted = max(int(_NEWEST * num_offered + (1 - _NEWEST) * self.admitted), 1)
            self._left = num_queued


class Cluster(FirstCome):
    """First come first served over lanes of one adapter each; workers prefer the adapters they run already.

    S-LoRA's adapter clustering (section 4.2), with a bounded wait: see `selection.py`.
    """

    clusters = True

    def lane_of(self, request: Request) -> LaneName:
        return "", request.adapter

    def lane_place(self, name: LaneName, head: Request) -> Place:
        return -head.priority, head.number
