"""Whether the gateway can take work, and the sentence that says why not."""

from common.errors import Unavailable
from gateway.directory import AdapterDirectory
from gateway.scheduler_link import SchedulerLink
from gateway.worker_links import WorkerLinks

RETRY_SECONDS = 1.0


class Readiness:
    """Ready: the scheduler is connected, a worker is attached, and the adapters were known once."""

    def __init__(self, scheduler: SchedulerLink, workers: WorkerLinks, directory: AdapterDirectory) -> None:
        self._scheduler = scheduler
        self._workers = workers
        self._directory = directory
        self.draining = False

    @property
    def ready(self) -> bool:
        return self._blocker() is None

    def check(self) -> None:
        """Raises Unavailable with a retry hint when a request cannot be served now."""
        if (blocker := self._blocker()) is not None:
            reason, message = blocker
            raise Unavailable(reason, message, retry_after_seconds=RETRY_SECONDS)

    def _blocker(self) -> tuple[str, str] | None:
        if self.draining:
            return "DRAINING", "this gateway is shutting down"
        if not self._scheduler.established:
            return "SCHEDULER_UNAVAILABLE", "the scheduler does not answer"
        if not self._workers.num_attached:
            return "NO_WORKER", "no worker is ready"
        if not self._directory.caught_up:
            return "ADAPTER_STORE_UNAVAILABLE", "the adapters are not known yet: the adapter store does not answer"
        return None
