"""The measurements. All rates are in MB (10^6 bytes) a second, all files are in the page cache."""

import asyncio
import hashlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from benchmarks.hardware import ROOT
from benchmarks.store.process import StoreProcess
from benchmarks.store.volume import NUM_LAYERS, TENANT, write_adapter, write_volume
from common.channel import connect
from common.packing import PackedLayout
from common.wire import layout_from_proto
from gpu_worker.host_storage import MappedFiles
from gpu_worker.memory.geometry import PageGeometry
from gpu_worker.memory.pool import PagePool
from loraplex.requests import Upload
from loraplex.v1 import adapter_store_pb2 as pb
from loraplex.v1 import adapter_store_pb2_grpc

NUM_ADAPTERS = 10_000
PAGE_SAMPLES = 50
READ_TIMES = 3
BEST_OF = 5
# Pages of a worker that serves the model of the large adapter, in bfloat16: 2 MiB each.
GEOMETRY = PageGeometry(num_layers=NUM_LAYERS, num_kv_heads=8, head_dim=128, element_bytes=2, page_size=16)
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
        layout = await _layout(store.address, version)
    mapped, verified = _mapped_rates(packed, layout)
    return {
        "adapter_mb": packed.stat().st_size / MB,
        "upload_mb_per_second": weights_bytes / upload_seconds / MB,
        "fetch_1_reader_mb_per_second": one,
        "fetch_8_readers_mb_per_second": eight,
        "cat_mb_per_second": _cat_rate(packed),
        "mapped_mb_per_second": mapped,
        "mapped_and_verified_mb_per_second": verified,
        "sha256_mb_per_second": _hash_rate(packed, hashlib.sha256),
        "blake3_mb_per_second": _hash_rate(packed, blake3),
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
    seconds = []
    for _ in range(BEST_OF):
        started = time.perf_counter()
        with Path("/dev/null").open("wb") as nowhere:
            subprocess.run(["cat", str(path)], stdout=nowhere, check=True)
        seconds.append(time.perf_counter() - started)
    return path.stat().st_size / min(seconds) / MB


async def _layout(address: str, version: str) -> PackedLayout:
    async with connect(address) as channel:
        stub = adapter_store_pb2_grpc.AdapterStoreServiceStub(channel)
        call = stub.FetchWeights(pb.FetchWeightsRequest(tenant=TENANT, adapter_version=version))
        first = await anext(aiter(call))
        call.cancel()
    return layout_from_proto(first.layout)


def _mapped_rates(path: Path, layout: PackedLayout) -> tuple[float, float]:
    """What a worker on the same volume does: maps the file and copies it into its pages; the same, and verifies."""
    pages = list(range(GEOMETRY.pages_for_bytes(layout.total_bytes)))
    pool = PagePool(GEOMETRY, len(pages), "cpu")
    pool.bytes.zero_()
    copied, verified = [], []
    for _ in range(BEST_OF):
        started = time.perf_counter()
        pool.write(pages, np.memmap(path, dtype=np.uint8, mode="c"))
        copied.append(time.perf_counter() - started)
        started = time.perf_counter()
        MappedFiles().open(path, layout).copy_to(pool, pages)
        verified.append(time.perf_counter() - started)
    return layout.total_bytes / min(copied) / MB, layout.total_bytes / min(verified) / MB


def _hash_rate(path: Path, new: Callable[[bytes], Any]) -> float:
    data, seconds = path.read_bytes(), []
    for _ in range(BEST_OF):
        started = time.perf_counter()
        new(data).digest()
        seconds.append(time.perf_counter() - started)
    return len(data) / min(seconds) / MB
