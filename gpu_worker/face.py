"""The face of a worker: keeps an engine running and carries messages between it, the scheduler, gateways and store."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path

from common.errors import LoraplexError
from gpu_worker.blob_cache import BlobCache
from gpu_worker.config import WorkerConfig, parse_bytes
from gpu_worker.engine_process import EngineProcess, engine_lost
from gpu_worker.fetcher import Fetcher
from gpu_worker.gateway_streams import GatewayStreams
from gpu_worker.metrics import WorkerMetrics
from gpu_worker.residency_mirror import ResidencyMirror
from gpu_worker.step_log import StepLog
from gpu_worker.tokenizer_files import read_tokenizer_files
from gpu_worker.warm_set import WarmSet
from loraplex.v1 import engine_pb2, scheduler_pb2, types_pb2, worker_pb2

_log = logging.getLogger(__name__)

WARM_SET_SECONDS = 10.0
REFILL_POLL_SECONDS = 0.02

# An engine that dies at once, again and again, must not eat the machine.
RESTART_SECONDS = 1.0


class Face:
    """One engine at a time, restarted when it dies; its streams then fail with UNAVAILABLE and nothing else does."""

    def __init__(self, config: WorkerConfig, worker_id: str, metrics: WorkerMetrics) -> None:
        self._config = config
        self.worker_id = worker_id
        self._metrics = metrics
        self.streams = GatewayStreams(worker_id, self._gateway_lost)
        self.cache = BlobCache(config.cache_dir, parse_bytes(config.cache_size))
        self.residency = ResidencyMirror()
        self.warm_set = WarmSet(config.cache_dir)
        self._fetcher = Fetcher(
            config.adapter_store, self.cache, metrics, self.send, config.store_volume, config.client_files
        )
        self._step_log = StepLog(config.step_log)
        self._tokenizer_files: dict[str, bytes] = {}
        self._engine: EngineProcess | None = None
        self.ready: engine_pb2.EngineReady | None = None
        self.engine_gone = asyncio.Event()
        # Set by the scheduler link.
        self.on_report: Callable[[scheduler_pb2.StepReport], None] = lambda report: None
        self.on_snapshot: Callable[[engine_pb2.EngineSnapshot], None] = lambda snapshot: None
        self.on_engine_lost: Callable[[], None] = lambda: None

    @property
    def model(self) -> types_pb2.ModelIdentity:
        if self.ready is None:
            raise engine_lost()
        return self.ready.model

    async def start(self) -> None:
        """Starts the first engine. Raises LoraplexError or ValueError with a sentence when it cannot start."""
        self._tokenizer_files = await asyncio.to_thread(read_tokenizer_files, Path(self._config.model))
        self._engine, self.ready = await EngineProcess.start(self._config)
        self._metrics.serves(self.ready)
        _log.info("engine ready", extra={"pid": self._engine.pid, "pages": self.ready.capacity.num_pages})

    async def refill(self) -> None:
        """Brings back what was hot in an earlier life of this worker: into pages as far as some are free.

        Ends when nothing is under way any more, or when the time for it is over. `run` must be running.
        """
        started, hot = time.monotonic(), self.warm_set.read()
        with contextlib.suppress(TimeoutError, LoraplexError):
            async with asyncio.timeout(self._config.warm_seconds):
                for tenant, version in hot:
                    await self.call_memory(_prefetch(tenant, version))
                while hot:
                    if not (await self.call_memory(_get_usage())).pending_prefetches:
                        break
                    await asyncio.sleep(REFILL_POLL_SECONDS)
        if hot:
            seconds, back = round(time.monotonic() - started, 3), sum(self.residency.is_here(v) for _, v in hot)
            _log.info("adapters of an earlier life are back", extra={"seconds": seconds, "back": back, "of": len(hot)})

    async def keep_warm_set(self) -> None:
        """Writes the warm set again and again. Runs until cancelled."""
        while True:
            await asyncio.sleep(WARM_SET_SECONDS)
            self.warm_set.write()

    async def run(self) -> None:
        """Dispatches the engine's events; starts a new engine whenever one ends. Runs until cancelled."""
        while True:
            if self._engine is not None:
                async for event in self._engine.events():
                    self._dispatch(event)
                await self._engine.stop()
                self._lose_engine()
            await asyncio.sleep(RESTART_SECONDS)
            try:
                self._engine, self.ready = await EngineProcess.start(self._config)
                self.engine_gone.clear()
                self._metrics.engine_restarted(self.ready)
                _log.warning("engine restarted", extra={"pid": self._engine.pid})
                for tenant, version in self.warm_set.hottest():
                    self.send(engine_pb2.EngineCommand(memory=_prefetch(tenant, version)))
            except LoraplexError as error:
                _log.error("the engine cannot start: %s", error.message)

    async def stop(self) -> None:
        if self._engine is not None:
            await self._engine.stop()
        await self._fetcher.close()
        self.warm_set.write()
        self.cache.close()
        self._step_log.close()

    def send(self, command: engine_pb2.EngineCommand) -> None:
        """Hands a command to the engine; dropped while there is none, because everything it knew is gone."""
        if self._engine is not None:
            self._engine.send(command)

    def send_scheduler_commands(self, batch: scheduler_pb2.CommandBatch) -> None:
        """Commands of the scheduler; offered sequences belong to their gateway from here on."""
        for command in batch.commands:
            if command.HasField("offer"):
                request = command.offer.request
                self._metrics.offered(request)
                self.streams.own(request.gateway_id, request.key, max(1, request.output.n))
                if request.adapter_version:
                    self.warm_set.note(request.key.tenant, request.adapter_version)
        self.send(engine_pb2.EngineCommand(scheduler_commands=batch))

    async def call_memory(self, command: engine_pb2.MemoryCommand) -> engine_pb2.MemoryReply:
        """Raises LoraplexError when refused or when there is no engine."""
        if self._engine is None:
            raise engine_lost()
        return await self._engine.call_memory(command)

    def welcome(self, known_tokenizer_digest: str) -> worker_pb2.AttachWelcome:
        """What a gateway learns first; the tokenizer files only when it has others."""
        welcome = worker_pb2.AttachWelcome(worker_id=self.worker_id, model=self.model)
        if known_tokenizer_digest != self.model.tokenizer_digest:
            for name, content in self._tokenizer_files.items():
                welcome.tokenizer_files.add(name=name, content=content)
        return welcome

    def _dispatch(self, event: engine_pb2.EngineEvent) -> None:
        if event.HasField("snapshot"):
            self.on_snapshot(event.snapshot)
        if not event.HasField("step"):
            return
        step = event.step
        self.streams.deliver(step.step_number, step.tokens)
        revoked = scheduler_pb2.REQUEST_STATE_REVOKED
        self.streams.release(progress.key for progress in step.report.progress if progress.state == revoked)
        for adapter_version in step.adapters_settled:
            self._fetcher.settled(adapter_version)
        for distrusted in step.adapters_distrusted:
            self._fetcher.distrust(distrusted.adapter_version, distrusted.sha256)
        self.residency.apply(step.report.residency)
        for needed in step.adapters_needed:
            self._fetcher.fetch(needed)
        self._metrics.step(step, time.time())
        if step.HasField("stats"):
            self._step_log.write(step.step_number, step.stats)
        self.on_report(step.report)

    def _lose_engine(self) -> None:
        _log.error("the engine process ended")
        self._engine = None
        self.ready = None
        self.engine_gone.set()
        self._fetcher.engine_lost()
        self.residency.lose_engine(engine_lost())
        self.streams.fail_all(engine_lost())
        self.on_engine_lost()

    def _gateway_lost(self, gateway_id: str) -> None:
        self.send(engine_pb2.EngineCommand(gateway_lost=engine_pb2.GatewayLost(gateway_id=gateway_id)))


def _prefetch(tenant: str, adapter_version: str) -> engine_pb2.MemoryCommand:
    adapter = engine_pb2.AdapterCommand(tenant=tenant, adapter_version=adapter_version)
    return engine_pb2.MemoryCommand(prefetch=adapter)


def _get_usage() -> engine_pb2.MemoryCommand:
    return engine_pb2.MemoryCommand(get_usage=engine_pb2.GetUsageCommand())
