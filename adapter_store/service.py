"""Wires an adapter store together and runs its life."""

import asyncio
from contextlib import AsyncExitStack, suppress

from adapter_store.base import read_base
from adapter_store.blobs import CHAT_TEMPLATE, CONFIG, WEIGHTS, Blobs, DiskLimits
from adapter_store.clock import Clock, SystemClock
from adapter_store.config import StoreConfig
from adapter_store.manifest import Manifest
from adapter_store.metrics import RedisMetrics, StoreMetrics
from adapter_store.peft_config import MAX_CONFIG_BYTES
from adapter_store.redis_link import RedisLink
from adapter_store.redis_registry import RedisRegistry
from adapter_store.registry import Registry
from adapter_store.servicer import AdapterStoreServicer
from adapter_store.sqlite_registry import SqliteRegistry
from adapter_store.store import AdapterStore, Policy
from common.server import Server, announce, until_signal
from loraplex.v1 import adapter_store_pb2, adapter_store_pb2_grpc

MAX_CHAT_TEMPLATE_BYTES = 64 * 1024


class StoreService:
    """One adapter store: folder, registry, server, and the task that removes old bytes."""

    server: Server
    store: AdapterStore

    def __init__(self, config: StoreConfig, clock: Clock | None = None) -> None:
        """Raises ValueError when the base model's folder is not one."""
        self._config = config
        self._clock = clock or SystemClock()
        self._base = None if config.model is None else read_base(config.model, config.model_name)
        self._undo = AsyncExitStack()

    async def start(self) -> None:
        """Cleans staging, opens the registry, listens, and is ready.

        Raises OSError when the folder, the registry or a port cannot be had; nothing is left open then.
        """
        async with AsyncExitStack() as undo:
            self.server = Server(self._config)
            undo.push_async_callback(self.server.grpc.stop, None)
            blobs, registry = await self._open(undo)
            metrics = StoreMetrics(self.server.registry)
            config = self._config
            policy = Policy(config.delete_grace_seconds, config.tenant_max_adapters, config.tenant_max_bytes)
            self.store = AdapterStore(registry, blobs, self._base, metrics, self._clock, policy)
            await self.store.refresh_metrics()
            servicer = AdapterStoreServicer(self.store, metrics)
            adapter_store_pb2_grpc.add_AdapterStoreServiceServicer_to_server(servicer, self.server.grpc)
            await self.server.start([adapter_store_pb2.DESCRIPTOR.services_by_name["AdapterStoreService"]])
            undo.push_async_callback(self.store.settle)
            undo.push_async_callback(_cancel, asyncio.create_task(self.store.sweep_forever()))
            undo.push_async_callback(self.server.stop)
            undo.callback(registry.stop_waiting)
            self._undo = undo.pop_all()
        await self.server.set_ready(True)

    async def stop(self) -> None:
        """Ends watches, drains calls, finishes uploads that are being published, closes."""
        await self._undo.aclose()

    async def _open(self, undo: AsyncExitStack) -> tuple[Blobs, Registry]:
        config = self._config
        file_bytes = {
            CONFIG: MAX_CONFIG_BYTES,
            WEIGHTS: config.max_adapter_bytes,
            CHAT_TEMPLATE: MAX_CHAT_TEMPLATE_BYTES,
        }
        blobs = Blobs(config.data_dir, DiskLimits(file_bytes, config.disk_reserve_bytes), shared=bool(config.redis))
        await asyncio.to_thread(blobs.start)
        undo.callback(blobs.close)
        manifest = Manifest(config.data_dir, blobs.staging)
        await asyncio.to_thread(manifest.start)
        index_path = blobs.instance_dir / "adapters.db"
        registry: Registry = SqliteRegistry(index_path, manifest)
        if config.redis:
            redis_metrics = RedisMetrics(self.server.registry)
            link = RedisLink(config.redis_address, redis_metrics.command_seconds.observe)
            registry = RedisRegistry(link, index_path, manifest, redis_metrics)
        await registry.open()
        undo.push_async_callback(registry.close)
        return blobs, registry


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def serve(config: StoreConfig) -> None:
    """The life of the process."""
    service = StoreService(config)
    await service.start()
    announce("adapter_store", grpc=service.server.address, metrics=service.server.metrics_address)
    await until_signal()
    await service.stop()
