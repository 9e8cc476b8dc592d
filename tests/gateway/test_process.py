"""`python -m gateway` as a process of its own."""

import asyncio
import re
import signal
import sys
from pathlib import Path

import grpc

from loraplex.v1 import gateway_pb2, gateway_pb2_grpc
from tests.gateway.fakes import FakeScheduler, FakeStore, FakeWorker

MAX_RSS_MIB = 150


def proc_file(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text()


async def test_a_process_becomes_ready_stays_small_and_ends_on_sigterm() -> None:
    scheduler, worker, store = FakeScheduler(), FakeWorker(), FakeStore()
    for peer in (worker, store, scheduler):
        await peer.start()
    scheduler.workers.append(worker.info)
    peers = ("--scheduler", scheduler.address, "--adapter-store", store.address)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway", *peers, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    assert process.stdout is not None
    try:
        line = (await process.stdout.readline()).decode()
        found = re.fullmatch(r"ready gateway grpc=(\S+) metrics=\S+:\d+\n", line)
        assert found, line
        async with grpc.aio.insecure_channel(found[1]) as channel:
            listed = await gateway_pb2_grpc.GatewayServiceStub(channel).ListModels(gateway_pb2.ListModelsRequest())
        assert len(listed.models) == 3
        rss = re.search(r"VmRSS:\s+(\d+) kB", proc_file(process.pid, "status"))
        assert rss is not None
        assert int(rss[1]) / 1024 < MAX_RSS_MIB
        assert "torch" not in proc_file(process.pid, "maps")
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        for peer in (scheduler, worker, store):
            await peer.stop()
