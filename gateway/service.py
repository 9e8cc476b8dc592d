"""The gateway's life and wiring."""

import asyncio
import logging
import uuid

from common.base_model import tokenizer_files
from common.channel import connect
from common.server import Server, announce, until_signal
from gateway.config import GatewayConfig
from gateway.delivery import DeliveryLimits
from gateway.directory import AdapterDirectory
from gateway.fleet import Fleet
from gateway.generation import Generator, Peers
from gateway.metrics import UNKNOWN_MODEL, GatewayMetrics
from gateway.quotas import Quotas
from gateway.readiness import Readiness
from gateway.requests import RequestTable
from gateway.scheduler_link import SchedulerLink
from gateway.servicer import GatewayServicer
from gateway.store_proxy import AdapterStoreProxy
from gateway.tokenization import TextTokenizer
from gateway.worker_links import WorkerLinks
from loraplex.v1 import adapter_store_pb2, adapter_store_pb2_grpc, gateway_pb2, gateway_pb2_grpc

_log = logging.getLogger(__name__)


class Gateway:
    """Everything one gateway process holds."""

    def __init__(self, config: GatewayConfig) -> None:
        """Raises ValueError when the tokenizer folder cannot be used, OSError when the file of a password or of a
        certificate cannot."""
        self._config = config
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        tokenizer = None if config.tokenizer is None else TextTokenizer(tokenizer_files(config.tokenizer))
        gateway_id = f"gateway-{uuid.uuid4().hex}"

        self.server = Server(config, max_message_bytes=config.max_message_bytes)
        self._metrics = GatewayMetrics(
            self.server.registry, max(1, config.max_adapter_labels), max(1, config.max_tenant_labels)
        )
        redis = config.redis_address if config.redis else None
        self._quotas = Quotas(config.quota, redis, self._metrics.quota_fallbacks.inc)
        self._store_channel = connect(config.adapter_store, tls=config.client_files)
        self._fleet = Fleet(tokenizer)
        self.table = RequestTable(self._metrics.duplicates.inc, self._metrics.gaps.inc)
        self._metrics.stream_buffer.set_function(lambda: self.table.buffered_bytes)
        on_change = self._changed.set
        self._directory = AdapterDirectory(self._store_channel, on_change)
        self._workers = WorkerLinks(gateway_id, self._fleet, self.table, on_change, config.client_files)
        self._scheduler = SchedulerLink(
            config.scheduler, gateway_id, self._workers, config.scheduler_grace_seconds, on_change, config.client_files
        )
        self._readiness = Readiness(self._scheduler, self._workers, self._directory)

    async def start(self) -> None:
        """Listens and begins to connect; `server.ready` says when work is taken. Raises OSError on a taken port."""
        self._register()
        services = (
            gateway_pb2.DESCRIPTOR.services_by_name["GatewayService"],
            adapter_store_pb2.DESCRIPTOR.services_by_name["AdapterStoreService"],
        )
        await self.server.start(services)
        self._tasks = [
            asyncio.create_task(work)
            for work in (self._scheduler.run(), self._directory.run(), self._follow_readiness())
        ]

    async def stop(self) -> None:
        """Takes no new calls, lets those in flight end within the drain time, closes all streams."""
        self._readiness.draining = True
        await self.server.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._workers.stop()
        await self._store_channel.close()
        await self._quotas.close()

    def _register(self) -> None:
        peers = Peers(table=self.table, scheduler=self._scheduler, workers=self._workers, metrics=self._metrics)
        generator = Generator(
            fleet=self._fleet,
            directory=self._directory,
            readiness=self._readiness,
            peers=peers,
            quotas=self._quotas,
            max_inflight_requests=self._config.max_inflight_requests,
            max_request_seconds=self._config.max_request_seconds,
            max_buffered_bytes=self._config.max_buffered_bytes,
            max_message_bytes=self._config.max_message_bytes,
        )
        servicer = GatewayServicer(
            generator,
            fleet=self._fleet,
            directory=self._directory,
            readiness=self._readiness,
            metrics=self._metrics,
            limits=DeliveryLimits(self._config.write_stall_seconds, self._config.max_message_bytes),
        )
        gateway_pb2_grpc.add_GatewayServiceServicer_to_server(servicer, self.server.grpc)
        proxy = AdapterStoreProxy(self._store_channel, self._directory)
        adapter_store_pb2_grpc.add_AdapterStoreServiceServicer_to_server(proxy, self.server.grpc)

    async def _follow_readiness(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            self._metrics.model = self._fleet.model.name if self._fleet.model is not None else UNKNOWN_MODEL
            ready = self._readiness.ready
            if ready != self.server.ready.is_set():
                _log.info("ready" if ready else "not ready")
                await self.server.set_ready(ready)


async def serve(config: GatewayConfig) -> None:
    """Runs a gateway until a signal."""
    gateway = Gateway(config)
    await gateway.start()
    greeting = asyncio.create_task(_greet(gateway.server))
    try:
        await until_signal()
    finally:
        greeting.cancel()
        await gateway.stop()


async def _greet(server: Server) -> None:
    await server.ready.wait()
    announce("gateway", grpc=server.address, metrics=server.metrics_address)
