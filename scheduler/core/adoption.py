"""What becomes of requests when a worker registers: with what it still has, and what it should have had."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto

from scheduler.core.model import Ending, Key, Progress, Request, RequestState
from scheduler.core.requests import RequestTable
from scheduler.core.worker import Worker


class Fate(Enum):
    """What follows for one attempt."""

    # The worker has it, and goes on with it.
    ADOPT = auto()
    # Another worker has it, or a newer attempt exists: it must end here.
    ABORT = auto()
    # The worker never heard of it, or gave it back: it waits again.
    QUEUE = auto()
    # It has ended meanwhile.
    FORGET = auto()


@dataclass(frozen=True, slots=True)
class Verdict:
    """`request` is None for a sequence that this scheduler does not know."""

    fate: Fate
    key: Key
    request: Request | None
    progress: Progress | None = None


def judge(in_flight: tuple[Progress, ...], previous: Worker | None, requests: RequestTable) -> Iterator[Verdict]:
    """What follows for everything the worker has now, and then for what it had in its `previous` registration."""
    before = dict(previous.requests) if previous is not None else {}
    for progress in in_flight:
        yield _judge_present(progress, before.pop(progress.key, None), requests)
    for request in before.values():
        assert previous is not None
        lost = is_unconfirmed(request, previous) and not request.aborted
        yield Verdict(Fate.QUEUE if lost else Fate.FORGET, request.key, request)


def _judge_present(progress: Progress, before: Request | None, requests: RequestTable) -> Verdict:
    if progress.state is Ending.REVOKED:
        fate = Fate.QUEUE if before is not None and not before.aborted else Fate.FORGET
        return Verdict(fate, progress.key, before, progress)
    if not isinstance(progress.state, RequestState):
        return Verdict(Fate.FORGET, progress.key, before, progress)
    if before is not None:
        return Verdict(Fate.ADOPT, progress.key, before, progress)
    known, newest = requests.get(progress.key), requests.newest(progress.key)
    if known is not None and known.state is RequestState.QUEUED:
        return Verdict(Fate.ADOPT, progress.key, known, progress)
    if known is not None or (newest is not None and newest.key.attempt > progress.key.attempt):
        return Verdict(Fate.ABORT, progress.key, None, progress)
    return Verdict(Fate.ADOPT, progress.key, None, progress)


def is_unconfirmed(request: Request, worker: Worker) -> bool:
    """Whether the worker may never have heard of the request."""
    return request.state is RequestState.OFFERED and request.offer_seq > worker.applied_seq
