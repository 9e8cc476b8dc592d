"""What a worker's reports must be like, and in which order they are taken."""

from collections.abc import Iterator

from scheduler.core.model import Key, Report
from scheduler.core.worker import Worker

# Reports that may be ahead of one that has not come: further ahead, it never will.
MAX_REPORTS_AHEAD = 10
# Attempts that a worker may report though it was never given them: one or two may be a race, many are not.
MAX_UNKNOWN = 8


class NonsenseError(Exception):
    """A worker reports what cannot be. `reason` is one of REASONS."""

    REASONS = ("epoch", "sequence", "pages", "tokens", "unknown")

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class ReportGapError(Exception):
    """A report, or a change of a worker's adapters, is missing: only a new hello tells what the worker has."""


class Intake:
    """Puts the numbered reports of one registration in order and checks them."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._last = 0
        self._early: dict[int, Report] = {}
        self._unknown: set[Key] = set()

    def take(self, report: Report) -> Iterator[Report]:
        """The reports that are due, each checked against the state that those before it have left.

        Raises NonsenseError, and ReportGapError when one is missing for good.
        """
        if not report.number:
            self._check(report)
            yield report
            return
        if report.number <= self._last or report.number in self._early:
            raise NonsenseError("sequence", f"report {report.number} came twice")
        self._early[report.number] = report
        while (due := self._early.pop(self._last + 1, None)) is not None:
            self._last += 1
            self._check(due)
            yield due
        if len(self._early) > MAX_REPORTS_AHEAD:
            raise ReportGapError(f"report {self._last + 1} of worker {self._worker.worker_id} is missing")

    def _check(self, report: Report) -> None:
        self._check_commands(report)
        self._check_pages(report)
        for progress in report.progress:
            request = self._worker.requests.get(progress.key)
            if request is None:
                self._note_unknown(progress.key)
                continue
            # What an earlier scheduler placed may have any size.
            limit = request.context_tokens if request.payload is not None else progress.computed_tokens
            if not 0 <= progress.computed_tokens <= limit:
                raise NonsenseError("tokens", f"{progress.computed_tokens} tokens computed of at most {limit}")
            if progress.generated_tokens < 0:
                raise NonsenseError("tokens", f"{progress.generated_tokens} tokens generated")

    def _check_commands(self, report: Report) -> None:
        worker = self._worker
        epoch, seq = report.scheduler_epoch, report.applied_seq
        # Until it has applied a command of this registration it names the last one of another.
        if epoch > worker.epoch or (worker.applied_seq and 0 < epoch < worker.epoch):
            raise NonsenseError("epoch", f"its epoch is {epoch}, that of its registration {worker.epoch}")
        if epoch == worker.epoch and seq > worker.last_seq:
            raise NonsenseError("sequence", f"it applied command {seq} of {worker.last_seq}")
        if epoch == worker.epoch and report.number and seq < worker.applied_seq:
            raise NonsenseError("sequence", f"it applied command {worker.applied_seq} and then {seq}")

    def _check_pages(self, report: Report) -> None:
        pool = self._worker.capacity.num_pages
        for residency in report.residency:
            if not 0 <= residency.num_pages <= pool:
                raise NonsenseError("pages", f"an adapter has {residency.num_pages} pages of a pool of {pool}")
        if report.pages is not None and (min(report.pages) < 0 or sum(report.pages) != pool):
            raise NonsenseError("pages", f"its pages are {report.pages}, together not {pool}")

    def _note_unknown(self, key: Key) -> None:
        if key in self._worker.disowned:
            return
        self._unknown.add(key)
        if len(self._unknown) > MAX_UNKNOWN:
            raise NonsenseError("unknown", f"it reports {len(self._unknown)} attempts that it was never given")
