"""The scheduler's life and wiring."""

import asyncio

from common.channel import INTERNAL_MESSAGE_BYTES
from common.server import Server, announce, until_signal
from loraplex.v1 import scheduler_pb2, scheduler_pb2_grpc
from scheduler.config import SchedulerConfig
from scheduler.dispatcher import Dispatcher
from scheduler.servicer import SchedulerServicer


class SchedulerService:
    """Everything one scheduler process holds."""

    def __init__(self, config: SchedulerConfig) -> None:
        """Raises ValueError on an option out of range."""
        self.server = Server(config, max_message_bytes=INTERNAL_MESSAGE_BYTES)
        self._dispatcher = Dispatcher(config.settings, self.server.registry)
        self.deciding: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listens and is ready. Raises OSError on a taken port."""
        servicer = SchedulerServicer(self._dispatcher)
        scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(servicer, self.server.grpc)
        await self.server.start([scheduler_pb2.DESCRIPTOR.services_by_name["SchedulerService"]])
        self.deciding = asyncio.create_task(self._dispatcher.run())
        await self.server.set_ready(True)

    async def stop(self) -> None:
        """Ends all streams; running sequences do not notice."""
        await self.server.set_ready(False)
        self._dispatcher.close()
        await self.server.stop()
        if self.deciding is not None:
            self.deciding.cancel()
            await asyncio.wait({self.deciding})


async def serve(config: SchedulerConfig) -> None:
    """Runs a scheduler until a signal. Raises what ends its decisions."""
    service = SchedulerService(config)
    await service.start()
    assert service.deciding is not None
    announce("scheduler", grpc=service.server.address, metrics=service.server.metrics_address)
    signalled = asyncio.create_task(until_signal())
    try:
        await asyncio.wait({signalled, service.deciding}, return_when=asyncio.FIRST_COMPLETED)
        if service.deciding.done():
            service.deciding.result()
    finally:
        signalled.cancel()
        await service.stop()
