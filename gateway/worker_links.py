"""The data path: one Attach stream to each worker of the fleet."""

import asyncio
import logging
from collections.abc import Callable, Iterable

import grpc

from common.errors import Unavailable
from common.tls import PemFiles
from common.version import PROTOCOL_VERSION
from gateway.fleet import Fleet
from gateway.link import IncompatiblePeer, Link
from gateway.requests import RequestTable
from loraplex.v1 import scheduler_pb2, types_pb2, worker_pb2, worker_pb2_grpc

RETRY_SECONDS = 1.0

_log = logging.getLogger(__name__)


class WorkerLinks:
    """Follows the scheduler's list of workers and hands their tokens to the request table.

    A worker that leaves the list keeps its stream for as long as the stream lives: a scheduler that starts anew lists
    nobody at first, and running requests must not notice.
    """

    def __init__(
        self,
        gateway_id: str,
        fleet: Fleet,
        table: RequestTable,
        on_change: Callable[[], None],
        tls: PemFiles | None = None,
    ) -> None:
        """`on_change` is called when a worker is attached or lost."""
        self.gateway_id = gateway_id
        self.fleet = fleet
        self.table = table
        self._on_change = on_change
        self.tls = tls
        self._links: dict[tuple[str, str], WorkerLink] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def num_attached(self) -> int:
        """Workers that can be given new requests."""
        return sum(link.established and not link.draining for link in self._links.values())

    def update(self, workers: Iterable[scheduler_pb2.WorkerInfo]) -> None:
        """Takes in the scheduler's list: dials the new, lets go of the missing."""
        listed = {(worker.worker_id, worker.address): worker for worker in workers}
        for key, link in self._links.items():
            link.wanted = key in listed
        for key, worker in listed.items():
            link = self._links.get(key) or self._dial(worker)
            link.draining = worker.state == scheduler_pb2.WORKER_STATE_DRAINING
        self._on_change()

    def place(
        self,
        key: types_pb2.RequestKey,
        worker_id: str,
        tier: "types_pb2.Tier.ValueType" = types_pb2.TIER_UNSPECIFIED,
    ) -> None:
        """The scheduler gave the attempt to this worker; fails it at once when there is no way to that worker."""
        self.table.place(key, worker_id, tier)
        if not any(link.usable for link in self._links_to(worker_id)):
            self.table.fail_placed(worker_id, _worker_lost)

    def abort(self, abort: scheduler_pb2.Abort, worker_id: str) -> bool:
        """Tells the worker to free what the outputs hold; False without a stream, which makes it do so by itself."""
        told = [link.send(worker_pb2.AttachRequest(abort=abort)) for link in self._links_to(worker_id)]
        return any(told)

    def lost(self, link: "WorkerLink") -> None:
        """Fails what the worker was doing for this gateway, unless it has moved to another address."""
        if not any(other.established for other in self._links_to(link.worker_id) if other is not link):
            self.table.fail_placed(link.worker_id, _worker_lost)
        self._on_change()

    def is_alone(self, link: "WorkerLink") -> bool:
        return not any(other.established for other in self._links.values() if other is not link)

    def attached(self) -> None:
        self._on_change()

    async def stop(self) -> None:
        """Closes all streams."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _links_to(self, worker_id: str) -> "list[WorkerLink]":
        return [link for link in self._links.values() if link.worker_id == worker_id]

    def _dial(self, worker: scheduler_pb2.WorkerInfo) -> "WorkerLink":
        link = WorkerLink(worker.worker_id, worker.address, self)
        self._links[worker.worker_id, worker.address] = link
        task = asyncio.create_task(self._keep(link))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return link

    async def _keep(self, link: "WorkerLink") -> None:
        try:
            # A link may be listed again while it closes.
            while link.wanted:
                await link.run()
        finally:
            del self._links[link.worker_id, link.address]
            self._on_change()


class WorkerLink(Link[worker_pb2.AttachRequest, worker_pb2.AttachResponse]):
    """The Attach stream to one worker."""

    def __init__(self, worker_id: str, address: str, owner: WorkerLinks) -> None:
        super().__init__(f"worker {worker_id}", address, tls=owner.tls)
        self.worker_id = worker_id
        self.draining = False
        # False after the worker turned out to serve something else.
        self.usable = True
        self._owner = owner
        self._attached = False

    @property
    def established(self) -> bool:
        return self._attached

    def _open(
        self, channel: grpc.aio.Channel
    ) -> "grpc.aio.StreamStreamCall[worker_pb2.AttachRequest, worker_pb2.AttachResponse]":
        return worker_pb2_grpc.WorkerServiceStub(channel).Attach()

    def _hello(self) -> worker_pb2.AttachRequest:
        return worker_pb2.AttachRequest(
            hello=worker_pb2.AttachHello(
                gateway_id=self._owner.gateway_id,
                protocol_version=PROTOCOL_VERSION,
                known_tokenizer_digest=self._owner.fleet.tokenizer_digest,
            )
        )

    def _received(self, message: worker_pb2.AttachResponse) -> None:
        if message.HasField("welcome"):
            self._welcome(message.welcome)
        elif self._attached:
            for sequence in message.tokens.sequences:
                self._owner.table.apply(self.worker_id, sequence)

    def _welcome(self, welcome: worker_pb2.AttachWelcome) -> None:
        self.usable = False
        if welcome.worker_id != self.worker_id:
            raise IncompatiblePeer(f"it calls itself {welcome.worker_id}, expected {self.worker_id}")
        self._owner.fleet.join(welcome, alone=self._owner.is_alone(self))
        self.usable = self._attached = True
        _log.info("worker attached", extra={"worker_id": self.worker_id, "address": self.address})
        self._owner.attached()

    def _lost(self) -> None:
        self._attached = False
        self._owner.lost(self)


def _worker_lost() -> Unavailable:
    message = "the worker that was generating this answer was lost"
    return Unavailable("WORKER_LOST", message, retry_after_seconds=RETRY_SECONDS)
