"""The timelines of the requests that ended last, for whoever asks why one took so long."""

from collections import OrderedDict
from dataclasses import dataclass

from scheduler.core.model import Key, Phases, Request


@dataclass(frozen=True, slots=True)
class Ended:
    """One attempt that was on a worker. All times in seconds; `offered` and `ended` count from its arrival."""

    key: Key
    adapter: str
    worker_id: str
    # finished, failed or lost.
    how: str
    offered: float
    ended: float
    generated_tokens: int
    preemptions: int
    preempted_seconds: float
    # What the worker says of it; None when it was lost, or the worker does not tell.
    phases: Phases | None


class History:
    """At most `size` attempts, in memory."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._ended: OrderedDict[Key, Ended] = OrderedDict()
        self._by_id: dict[str, list[Key]] = {}

    def __len__(self) -> int:
        return len(self._ended)

    def add(self, request: Request, how: str, now: float, phases: Phases | None, worker_id: str) -> None:
        """The request has left its worker."""
        timeline, key = request.timeline, request.key
        offered = request.arrived if timeline.offered is None else timeline.offered
        waits = 0.0 if timeline.preempted is None else now - timeline.preempted
        ended = Ended(
            key=key,
            adapter=request.adapter,
            worker_id=worker_id,
            how=how,
            offered=offered - request.arrived,
            ended=now - request.arrived,
            generated_tokens=request.generated_tokens,
            preemptions=timeline.preemptions,
            preempted_seconds=timeline.preempted_seconds + waits,
            phases=phases,
        )
        if self._ended.pop(key, None) is None:
            self._by_id.setdefault(key.request_id, []).append(key)
        self._ended[key] = ended
        if len(self._ended) > self._size:
            self._forget()

    def of(self, request_id: str) -> list[Ended]:
        """The attempts at requests of this id, of all tenants, in the order in which they ended."""
        return [self._ended[key] for key in self._by_id.get(request_id, ())]

    def _forget(self) -> None:
        key, _ = self._ended.popitem(last=False)
        keys = self._by_id[key.request_id]
        keys.remove(key)
        if not keys:
            del self._by_id[key.request_id]
