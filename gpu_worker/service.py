"""The life of a worker process: engine, servers, scheduler link, until a signal."""

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Coroutine
from typing import Any

from common.channel import INTERNAL_MESSAGE_BYTES
from common.errors import LoraplexError
from common.server import Server, announce, until_signal
from gpu_worker.config import WorkerConfig
from gpu_worker.face import Face
from gpu_worker.memory_servicer import MemoryServicer
from gpu_worker.metrics import WorkerMetrics
from gpu_worker.scheduler_link import SchedulerLink
from gpu_worker.worker_servicer import WorkerServicer
from loraplex.v1 import memory_pb2, memory_pb2_grpc, worker_pb2, worker_pb2_grpc

_log = logging.getLogger(__name__)


async def serve(config: WorkerConfig) -> None:
    """Runs a worker until SIGTERM or SIGINT. Raises ValueError with a sentence when it cannot start."""
    server = Server(config, max_message_bytes=INTERNAL_MESSAGE_BYTES)
    worker_id = config.worker_id or f"worker-{uuid.uuid4().hex[:8]}"
    face = Face(config, worker_id, WorkerMetrics(server.registry, vllm_names=config.vllm_metrics))
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(WorkerServicer(face), server.grpc)
    memory_pb2_grpc.add_MemoryServiceServicer_to_server(MemoryServicer(face), server.grpc)
    stop = asyncio.create_task(until_signal())
    if not await _started(face, stop):
        return
    services = (worker_pb2.DESCRIPTOR.services_by_name, memory_pb2.DESCRIPTOR.services_by_name)
    await server.start([descriptor for names in services for descriptor in names.values()])
    link = SchedulerLink(config.scheduler, config.advertise_address or server.address, face, config.client_files)
    tasks = [asyncio.create_task(face.run()), asyncio.create_task(face.keep_warm_set())]
    # Before the scheduler knows of this worker: what it had comes back first.
    await _unless_stopped(face.refill(), stop)
    tasks.append(asyncio.create_task(link.run()))
    readiness = asyncio.create_task(_follow_readiness(server, face, link))
    try:
        await asyncio.wait({stop, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        readiness.cancel()
        await server.drain()
        await link.drain()
        await _finish_streams(face, config.drain_seconds)
        face.streams.closing.set()
    finally:
        for task in (stop, readiness, *tasks):
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        await face.stop()
        await link.close()
        await server.stop()
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome


async def _started(face: Face, stop: asyncio.Task[None]) -> bool:
    """Starts the engine; False when a signal comes first. Raises ValueError with the engine's sentence."""
    start = asyncio.create_task(face.start())
    await asyncio.wait({start, stop}, return_when=asyncio.FIRST_COMPLETED)
    if not start.done():
        start.cancel()
        await asyncio.gather(start, return_exceptions=True)
        await face.stop()
        return False
    try:
        start.result()
    except LoraplexError as error:
        stop.cancel()
        raise ValueError(error.message) from None
    return True


async def _unless_stopped(work: Coroutine[Any, Any, None], stop: asyncio.Task[None]) -> None:
    """Does `work` to its end, or until a signal comes."""
    task = asyncio.create_task(work)
    await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _follow_readiness(server: Server, face: Face, link: SchedulerLink) -> None:
    """Ready once registered; the later loss of the scheduler stops no stream, the loss of the engine does."""
    announced = False
    while True:
        await link.registered.wait()
        await server.set_ready(True)
        if not announced:
            announce("gpu_worker", grpc=server.address, metrics=server.metrics_address)
            announced = True
        await face.engine_gone.wait()
        await server.set_ready(False)


async def _finish_streams(face: Face, drain_seconds: float) -> None:
    """Waits until no sequence is in flight, at most for the drain time."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(drain_seconds):
            await face.streams.idle.wait()
