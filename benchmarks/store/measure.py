"""The measurements. All rates are in MB (10^6 bytes) a second, all files are in the page cache."""

import asyncio
import hashlib
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.hardware import ROOT
from benchmarks.store.process import StoreProcess
from benchmarks.store.volume import TENANT, write_adapter, write_volume
from common.channel import connect
from loraplex.requests import Upload
from loraplex.v1 import adapter_store_pb2 as pb
from loraplex.v1 import adapter_store_pb2_grpc

NUM_ADAPTERS = 10_000
PAGE_SAMPLES = 50
READ_TIMES = 3
MB = 1e6


async def measure_metadata(folder: Path) -> dict[str, float]:
    """Start-up, list page, watch resync and memory with 10,000 adapters."""
    data_dir = folder / "many"
    write_volume(data_dir, NUM_ADAPTERS)
    with StoreProcess(data_dir) as store:
        cold_seconds = store.start_seconds
    with StoreProcess(data_dir) as store:
        async with connect(store.address) as channel:
            stub = adapter_store_pb2_grpc.AdapterStoreServiceStub(channel)
            page_seconds = await _page_seconds(stub, 100)
            large_page_seconds = await _page_seconds(stub, 1000)
            started, changes = time.perf_counter(), 0
            async for response in stub.WatchAdapters(pb.WatchAdaptersRequest()):
                changes += len(response.changes)
                if response.caught_up:
                    break
            watch_seconds = time.perf_counter() - started
        if changes != NUM_ADAPTERS:
            raise AssertionError(f"the watch told of {changes} adapters")
        return {
            "start_index_lost_seconds": cold_seconds,
            "start_warm_seconds": store.start_seconds,
            "list_page_100_ms": 1000 * page_seconds,
            "list_page_1000_ms": 1000 * large_page_seconds,
            "watch_resync_seconds": watch_seconds,
            "rss_mb": store.rss_bytes / MB,
        }


async def _page_seconds(stub: "adapter_store_pb2_grpc.AdapterStoreServiceAsyncStub", page_size: int) -> float:
    """Median of pages all over the tenant's list."""
    seconds = []
    for sample in range(PAGE_SAMPLES):
        token = f"adapter-{sample * (NUM_ADAPTERS // PAGE_SAMPLES):05d}"
        started = time.perf_counter()
        page = await stub.ListAdapters(
            pb.ListAdaptersRequest(tenant=TENANT, page_size=page_size, page_token=token), timeout=30
        )
        seconds.append(time.perf_counter() - started)
        if not page.adapters:
            raise AssertionError("an empty page")
    return statistics.median(seconds)


async def measure_transfer(folder: Path) -> dict[str, float]:
    """Upload, fetch by one and by eight readers, and the mapped path, beside `cat` of the same file."""
    adapter, data_dir = folder / "adapter", folder / "one"
    write_adapter(adapter)
    weights_bytes = (adapter / "adapter_model.safetensors").stat().st_size
    with StoreProcess(data_dir) as store:
        async with connect(store.address) as channel:
            stub = adapter_store_pb2_grpc.AdapterStoreServiceStub(channel)
            started = time.perf_counter()
            response = await stub.UploadAdapter(_with_tenant(Upload("large", adapter)))
            upload_seconds = time.perf_counter() - started
        version = response.adapter.adapter_version
        packed = data_dir / "objects" / version / "packed.bfloat16"
        one = await asyncio.to_thread(_read_rate, store.address, version, 1)
        eight = await asyncio.to_thread(_read_rate, store.address, version, 8)
    mapped, verified = _mapped_rates(packed)
    return {
        "adapter_mb": packed.stat().st_size / MB,
        "upload_mb_per_second": weights_bytes / upload_seconds / MB,
        "fetch_1_reader_mb_per_second": one,
        "fetch_8_readers_mb_per_second": eight,
        "cat_mb_per_second": _cat_rate(packed),
        "mapped_mb_per_second": mapped,
        "mapped_and_verified_mb_per_second": verified,
        "sha256_mb_per_second": _sha256_rate(packed),
    }


def _with_tenant(upload: Upload) -> Iterator[pb.UploadAdapterRequest]:
    for message in upload.messages():
        if message.HasField("header"):
            message.header.tenant = TENANT
        yield message


def _read_rate(address: str, version: str, readers: int) -> float:
    """Of all readers together; each is a process of its own and fetches the adapter some times."""
    command = [sys.executable, "-m", "benchmarks.store.reader", address, version, str(READ_TIMES)]
    processes = [
        subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(readers)
    ]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    started = time.perf_counter()
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    received = sum(int(process.communicate()[0]) for process in processes)
    return received / (time.perf_counter() - started) / MB


def _cat_rate(path: Path) -> float:
    """Best of three."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        with Path("/dev/null").open("wb") as nowhere:
            subprocess.run(["cat", str(path)], stdout=nowhere, check=True)
        seconds.append(time.perf_counter() - started)
    return path.stat().st_size / min(seconds) / MB


def _mapped_rates(path: Path) -> tuple[float, float]:
    """What a worker on the same volume does: maps, copies into its pages; then hashes the bytes in its pages."""
    pages = np.ones(path.stat().st_size, dtype=np.uint8)
    copied, verified = [], []
    for _ in range(3):
        started = time.perf_counter()
        pages[:] = np.memmap(path, dtype=np.uint8, mode="r")
        copied.append(time.perf_counter() - started)
        hashlib.sha256(pages.data).hexdigest()
        verified.append(time.perf_counter() - started)
    return pages.size / min(copied) / MB, pages.size / min(verified) / MB


def _sha256_rate(path: Path) -> float:
    data = path.read_bytes()
    started = time.perf_counter()
    hashlib.sha256(data).hexdigest()
    return len(data) / (time.perf_counter() - started) / MB
