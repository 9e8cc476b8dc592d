"""How soon a store says no: figures of rows that the tests hold with bounds a busy machine bears."""

import asyncio
import math
import os
import signal
import statistics
import time
from collections.abc import Awaitable
from pathlib import Path

import grpc

from benchmarks.hardware import ROOT
from benchmarks.store.process import StoreProcess
from benchmarks.store.volume import write_adapter
from common.channel import connect
from loraplex import AsyncClient, Client, errors
from loraplex.fleet import Fleet, FleetOptions
from loraplex.requests import Upload
from loraplex.retries import RetryPolicy
from loraplex.v1 import adapter_store_pb2 as pb
from loraplex.v1 import adapter_store_pb2_grpc
from tests.adapter_store.redis_server import RedisServer

DEMO = ROOT / "examples" / "demo_model"
TENANT, OTHER = "bench", "other"
PAIRS, REFUSALS, CROWD, RETURNS = 1000, 20, 20, 3
GIVE_UP_SECONDS = 30.0


async def measure_names(folder: Path) -> dict[str, float]:
    """C 2: an adapter of another tenant beside one that nobody has, asked for in turn.

    The difference of the medians as a share of the median, and how far the count of pairs in which the foreign one took
    longer is from that of a fair coin, in standard deviations.
    """
    seconds: dict[bool, list[float]] = {True: [], False: []}
    with StoreProcess(folder / "names") as store:
        async with connect(store.address) as channel:
            stub = adapter_store_pb2_grpc.AdapterStoreServiceStub(channel)
            await _put(stub, folder / "small", "m")
            for pair in range(PAIRS):
                for foreign in (pair % 2 == 0, pair % 2 == 1):
                    request = pb.GetAdapterRequest(tenant=OTHER, adapter_id="m" if foreign else "n")
                    seconds[foreign].append(await _refused_seconds(stub.GetAdapter(request), grpc.StatusCode.NOT_FOUND))
    foreign_median, unknown_median = (statistics.median(seconds[foreign]) for foreign in (True, False))
    slower = sum(foreign > unknown for foreign, unknown in zip(seconds[True], seconds[False], strict=True))
    return {
        "c02_unknown_ms": 1000 * unknown_median,
        "c02_foreign_difference_share": abs(foreign_median - unknown_median) / unknown_median,
        "c02_sign_test_deviations": abs(slower - PAIRS / 2) / math.sqrt(PAIRS / 4),
    }


async def measure_redis(folder: Path) -> dict[str, float]:
    """B 11 and 12: the slowest refusal while Redis is away and while it is paused, and how soon writes are back."""
    redis = RedisServer(folder / "redis")
    redis.start()
    try:
        with StoreProcess(folder / "shared", "--redis", redis.url) as store:
            async with connect(store.address) as channel:
                stub = adapter_store_pb2_grpc.AdapterStoreServiceStub(channel)
                version = await _put(stub, folder / "small", "m")
                # All at once, before anybody knows: later ones are refused at the door.
                redis.pause()
                paused = await asyncio.gather(*(_refused_alias(stub, version) for _ in range(CROWD)))
                redis.resume()
                back = [await _back_seconds(stub, version)]
                down = []
                for _ in range(RETURNS):
                    await asyncio.to_thread(redis.stop)
                    down += [await _refused_alias(stub, version) for _ in range(REFUSALS)]
                    await asyncio.to_thread(redis.start)
                    back.append(await _back_seconds(stub, version))
    finally:
        redis.stop()
    return {
        "b11_redis_down_refused_ms": 1000 * max(down),
        "b11_redis_back_seconds": max(back),
        "b12_redis_paused_blocked_ms": 1000 * max(paused),
    }


async def measure_store_away(folder: Path) -> dict[str, float]:
    """B 15: a request for a cold adapter of a fleet whose store was killed, from the call to UNAVAILABLE."""
    with Fleet(FleetOptions(model=DEMO / "base", data_dir=folder / "fleet", memory="32MiB")) as fleet:
        with Client(fleet.gateway.address) as client:
            for name in ("upper", "sort"):
                client.adapters.push(name, DEMO / "adapters" / name)
        async with AsyncClient(fleet.gateway.address, retries=RetryPolicy(attempts=1)) as client:
            await client.generate("word", "upper", max_tokens=1)
            os.kill(fleet.services["adapter_store"].pid, signal.SIGKILL)
            started = time.perf_counter()
            try:
                await client.generate("word", "sort", max_tokens=1, timeout=GIVE_UP_SECONDS)
            except errors.Unavailable:
                return {"b15_store_away_refused_seconds": time.perf_counter() - started}
    raise AssertionError("a cold adapter was served without a store")


async def _put(stub: "adapter_store_pb2_grpc.AdapterStoreServiceAsyncStub", folder: Path, adapter_id: str) -> str:
    await asyncio.to_thread(write_adapter, folder, num_layers=1, lora_rank=1)
    messages = list(Upload(adapter_id, folder).messages())
    messages[0].header.tenant = TENANT
    return (await stub.UploadAdapter(iter(messages))).adapter.adapter_version


async def _refused_alias(stub: "adapter_store_pb2_grpc.AdapterStoreServiceAsyncStub", version: str) -> float:
    request = pb.SetAliasRequest(tenant=TENANT, adapter_id="alias", adapter_version=version)
    return await _refused_seconds(stub.SetAlias(request), grpc.StatusCode.UNAVAILABLE)


async def _refused_seconds(call: Awaitable[object], code: grpc.StatusCode) -> float:
    started = time.perf_counter()
    try:
        await call
    except grpc.aio.AioRpcError as error:
        seconds = time.perf_counter() - started
        if error.code() is not code:
            raise
        return seconds
    raise AssertionError("a call was to be refused")


async def _back_seconds(stub: "adapter_store_pb2_grpc.AdapterStoreServiceAsyncStub", version: str) -> float:
    """Until a write is taken."""
    started = time.perf_counter()
    while time.perf_counter() - started < GIVE_UP_SECONDS:
        try:
            await stub.SetAlias(pb.SetAliasRequest(tenant=TENANT, adapter_id="back", adapter_version=version))
        except grpc.aio.AioRpcError:
            await asyncio.sleep(0.01)
            continue
        seconds = time.perf_counter() - started
        await stub.DeleteAdapter(pb.DeleteAdapterRequest(tenant=TENANT, adapter_id="back"))
        return seconds
    raise AssertionError("writes did not come back")
