"""The scheduler's life and wiring."""

import asyncio
import logging
import time

from common.channel import INTERNAL_MESSAGE_BYTES
from common.server import Server, announce, until_signal
from loraplex.v1 import scheduler_pb2, scheduler_pb2_grpc
from scheduler.config import SchedulerConfig
from scheduler.dispatcher import Dispatcher
from scheduler.lease import Lease
from scheduler.metrics import active_gauge
from scheduler.servicer import SchedulerServicer

_log = logging.getLogger(__name__)


class LeaseLostError(Exception):
    """Another scheduler is the active one now, or Redis has forgotten that this one was."""


class SchedulerService:
    """Everything one scheduler process holds."""

    def __init__(self, config: SchedulerConfig) -> None:
        """Raises ValueError on an option out of range, OSError when a file of Redis's options cannot be read."""
        self.server = Server(config, max_message_bytes=INTERNAL_MESSAGE_BYTES)
        self._settings = config.settings
        self._max_tenant_labels = max(1, config.max_tenant_labels)
        self._lease: Lease | None = None
        if config.redis:
            address = config.redis_address
            self._lease = Lease(address.client(), address.prefix, config.lease_seconds)
        self._servicer = SchedulerServicer()
        self._active = active_gauge(self.server.registry)
        self.working: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listens, and decides: at once, or as soon as it has the lease. Raises OSError on a taken port."""
        scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(self._servicer, self.server.grpc)
        await self.server.start([scheduler_pb2.DESCRIPTOR.services_by_name["SchedulerService"]])
        if self._lease is None:
            # A scheduler that starts later on one machine has a greater epoch.
            dispatcher = await self._activate(time.time_ns() // 1_000_000)
            self.working = asyncio.create_task(dispatcher.run())
        else:
            await self.server.set_ready(True, standby=True)
            self.working = asyncio.create_task(self._work_under(self._lease))

    async def stop(self) -> None:
        """Ends all streams; running sequences do not notice."""
        await self.server.set_ready(False)
        if self._servicer.active is not None:
            self._servicer.active.close()
        if self.working is not None:
            self.working.cancel()
            await asyncio.wait({self.working})
        if self._lease is not None:
            await self._lease.close()
        await self.server.stop()

    async def _work_under(self, lease: Lease) -> None:
        """Raises LeaseLostError when the lease is lost, and what ends the decisions."""
        _log.info("standing by")
        dispatcher = await self._activate(await lease.acquire())
        tasks = [asyncio.create_task(dispatcher.run()), asyncio.create_task(lease.keep())]
        try:
            (ended, *_), _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            ended.result()
            raise LeaseLostError
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _activate(self, epoch: int) -> Dispatcher:
        lease = self._lease
        dispatcher = Dispatcher(
            self._settings, self.server.registry, epoch, lambda: lease is None or lease.current, self._max_tenant_labels
        )
        self._servicer.active = dispatcher
        self._active.set(1)
        await self.server.set_ready(True)
        _log.info("active", extra={"scheduler_epoch": epoch})
        return dispatcher


async def serve(config: SchedulerConfig) -> None:
    """Runs a scheduler until a signal. Raises what ends its decisions.

    One that has lost its lease ends with code 1: whatever it knew is the new one's to learn, and it comes back as a
    standby when it is started again.
    """
    service = SchedulerService(config)
    await service.start()
    assert service.working is not None
    announce("scheduler", grpc=service.server.address, metrics=service.server.metrics_address)
    signalled = asyncio.create_task(until_signal())
    try:
        await asyncio.wait({signalled, service.working}, return_when=asyncio.FIRST_COMPLETED)
        if service.working.done():
            service.working.result()
    except LeaseLostError:
        _log.error("the lease is lost: another scheduler is active, or Redis has lost its keys")
        raise SystemExit(1) from None
    finally:
        signalled.cancel()
        await service.stop()
