"""`python -m gpu_worker` for real: two processes, gRPC on sockets, and what happens when one of them goes."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from common.errors import from_rpc_error
from loraplex.v1 import memory_pb2, memory_pb2_grpc, scheduler_pb2, types_pb2, worker_pb2
from tests.gpu_worker.engine_driver import EngineDriver, new_offer
from tests.gpu_worker.neighbours import FakeScheduler, FakeStore, serving
from tests.gpu_worker.tiny_model import CONTEXT, TinyAdapter
from tests.gpu_worker.worker_process import DEADLINE_SECONDS, WorkerProcess, has_ended, libraries, started

PROMPT = list(range(2, 12))
NUM_LONG = 500


@pytest.fixture
async def scheduler() -> FakeScheduler:
    return FakeScheduler()


@pytest.fixture
async def store(tiny_adapters: list[TinyAdapter]) -> FakeStore:
    store = FakeStore()
    store.adapters = {adapter.version: adapter for adapter in tiny_adapters}
    return store


@pytest.fixture
async def worker(
    tiny_checkpoint: Path, tmp_path: Path, scheduler: FakeScheduler, store: FakeStore
) -> AsyncIterator[WorkerProcess]:
    async with (
        serving(store, scheduler) as address,
        started(tiny_checkpoint, tmp_path, address, scheduler, "--max-sequences=1") as worker,
    ):
        yield worker


@pytest.fixture(scope="module")
def expected(tiny_checkpoint: Path, tiny_adapters: list[TinyAdapter]) -> list[int]:
    return EngineDriver(tiny_checkpoint, tiny_adapters).generate("s", PROMPT, "rank-8")


def long_offer(name: str) -> scheduler_pb2.Offer:
    """As many tokens as the model can make."""
    return new_offer(name, [2], max_tokens=CONTEXT)


async def test_a_worker_serves(worker: WorkerProcess, scheduler: FakeScheduler, expected: list[int]) -> None:
    """One worker process, one sentence after another: starting it takes seconds."""
    hello = worker.hello
    assert (hello.worker_id, hello.capacity.num_pages, len(hello.in_flight)) == ("w", 200, 0)
    before = await worker.usage()
    assert before.memory == hello.memory

    assert "libtorch" not in libraries(worker.process.pid)
    assert "libtorch" in libraries(worker.engine_pid)

    async with worker.attached() as gateway:
        assert gateway.welcome.model == hello.model
        assert [file.name for file in gateway.welcome.tokenizer_files] == ["tokenizer.json"]

        scheduler.command(offer=new_offer("s", PROMPT, "rank-8"))
        tokens, last = await gateway.until_finished()
        assert (tokens, last.finish_reason) == (expected, types_pb2.FINISH_REASON_LENGTH)

        scheduler.command(offer=new_offer("t", PROMPT, "nobody"))
        _, last = await gateway.until_finished()
        assert last.error.reason == "ADAPTER_NOT_FOUND"

        await the_scheduler_hears_of(scheduler, "t", scheduler_pb2.REQUEST_STATE_FAILED)
        await operators_manage_memory(worker)

    memory = (await worker.usage()).memory
    assert memory.free_pages + memory.prefix_pages == before.memory.free_pages


async def the_scheduler_hears_of(
    scheduler: FakeScheduler, name: str, state: "scheduler_pb2.RequestState.ValueType"
) -> None:
    async with asyncio.timeout(DEADLINE_SECONDS):
        while True:
            report = await scheduler.reports.get()
            if (name, state) in [(progress.key.request_id, progress.state) for progress in report.progress]:
                return


async def operators_manage_memory(worker: WorkerProcess) -> None:
    stub = memory_pb2_grpc.MemoryServiceStub(worker.channel)
    resident = await stub.ListResident(memory_pb2.ListResidentRequest())
    assert [adapter.adapter_version for adapter in resident.adapters] == ["rank-8"]
    first = await anext(aiter(stub.WatchResidency(memory_pb2.WatchResidencyRequest())))
    assert [(adapter.adapter_version, adapter.tier) for adapter in first.snapshot] == [("rank-8", types_pb2.TIER_PAGES)]
    await stub.Pin(memory_pb2.PinRequest(adapter_version="rank-8"))
    assert (await worker.usage()).memory.pinned_adapters == 1
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.Evict(memory_pb2.EvictRequest(adapter_version="rank-8"))
    assert from_rpc_error(refused.value, peer="worker").reason == "ADAPTER_IN_USE"
    await stub.Unpin(memory_pb2.UnpinRequest(adapter_version="rank-8"))
    assert (await worker.usage()).memory.pinned_adapters == 0
    evicted = await stub.Evict(memory_pb2.EvictRequest(adapter_version="rank-8"))
    assert evicted.freed_pages == 14


async def test_a_restarted_worker_has_its_hot_adapters_before_it_registers(
    tiny_checkpoint: Path, tmp_path: Path, scheduler: FakeScheduler, store: FakeStore, expected: list[int]
) -> None:
    async with serving(store, scheduler) as address:
        async with started(tiny_checkpoint, tmp_path, address, scheduler) as first, first.attached() as gateway:
            scheduler.command(offer=new_offer("s", PROMPT, "rank-8"))
            await gateway.until_finished()
            first.process.terminate()
            async with asyncio.timeout(DEADLINE_SECONDS):
                await first.process.wait()
        async with started(tiny_checkpoint, tmp_path, address, scheduler) as second:
            (resident,) = second.hello.resident
            assert (resident.adapter_version, resident.tier) == ("rank-8", types_pb2.TIER_PAGES)


async def test_a_stream_cut_short_costs_its_own_request_only(
    worker: WorkerProcess, scheduler: FakeScheduler, store: FakeStore, tmp_path: Path, expected: list[int]
) -> None:
    store.adapters["rank-3"] = store.adapters["rank-3"].cut_short(tmp_path)
    async with worker.attached() as gateway:
        scheduler.command(offer=new_offer("first", PROMPT, "rank-8"))
        assert (await gateway.until_finished())[0] == expected
        scheduler.command(offer=new_offer("cut", PROMPT, "rank-3"))
        scheduler.command(offer=new_offer("resident", PROMPT, "rank-8"))
        tokens, lasts = list[int](), dict[str, worker_pb2.SequenceTokens]()
        while len(lasts) < 2:
            for message in await gateway.next():
                tokens += message.token_ids
                if message.finish_reason:
                    lasts[message.key.request_id] = message
    assert lasts["cut"].error.reason == "ADAPTER_CORRUPT"
    assert (lasts["resident"].finish_reason, tokens) == (types_pb2.FINISH_REASON_LENGTH, expected)


async def test_a_gateway_that_goes_leaves_its_pages(worker: WorkerProcess, scheduler: FakeScheduler) -> None:
    before = await worker.usage()
    async with worker.attached() as gateway:
        # One after another, so many that they run for longer than the gateway may be away.
        for number in range(NUM_LONG):
            scheduler.command(offer=long_offer(f"s{number}"))
        await gateway.next()
    usage = await worker.usage_when(lambda usage: usage.running_sequences == usage.waiting_sequences == 0)
    assert usage.memory.kv_pages == 0
    assert usage.memory.free_pages + usage.memory.evictable_pages == before.memory.free_pages
    await the_scheduler_hears_of_an_abort(scheduler)


async def the_scheduler_hears_of_an_abort(scheduler: FakeScheduler) -> None:
    async with asyncio.timeout(DEADLINE_SECONDS):
        while True:
            report = await scheduler.reports.get()
            if types_pb2.FINISH_REASON_ABORTED in [progress.finish_reason for progress in report.progress]:
                return


async def test_a_new_engine_takes_the_place_of_a_killed_one(
    worker: WorkerProcess, scheduler: FakeScheduler, store: FakeStore, expected: list[int]
) -> None:
    async with worker.attached() as gateway:
        # It waits for an adapter that does not arrive.
        store.go_on.clear()
        scheduler.command(offer=new_offer("s", PROMPT, "rank-8"))
        await store.started.get()
        os.kill(worker.engine_pid, signal.SIGKILL)
        _, last = await gateway.until_finished()
        assert (last.error.code, last.error.reason) == (grpc.StatusCode.UNAVAILABLE.value[0], "ENGINE_LOST")
        assert last.error.retry_after_seconds > 0

        async with asyncio.timeout(DEADLINE_SECONDS):
            again = await scheduler.hellos.get()
        assert (again.worker_id, len(again.in_flight), again.memory.free_pages) == ("w", 0, 200)

        store.go_on.set()
        scheduler.command(offer=new_offer("u", PROMPT, "rank-8"))
        tokens, _ = await gateway.until_finished()
        assert tokens == expected


async def test_sigterm_ends_both_processes(worker: WorkerProcess, scheduler: FakeScheduler) -> None:
    engine = worker.engine_pid
    async with worker.attached() as gateway:
        scheduler.command(offer=long_offer("s"))
        await gateway.next()
        worker.process.send_signal(signal.SIGTERM)
        # What runs may finish; then the stream ends, and nobody waits for the rest of the drain time.
        _, last = await gateway.until_finished()
        assert last.finish_reason == types_pb2.FINISH_REASON_LENGTH
        async with asyncio.timeout(DEADLINE_SECONDS):
            assert await gateway.next() == []
            assert await worker.process.wait() == 0
    assert has_ended(engine)
