"""Security C 2 and 3 at the store: what is another tenant's looks like nothing, and an id is never a path."""

import asyncio
import functools
import math
import os
import re
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from prometheus_client import CollectorRegistry

from adapter_store.indexed_registry import IndexedRegistry
from adapter_store.redis_registry import RedisRegistry
from adapter_store.service import StoreService
from common.channel import connect
from common.errors import InvalidArgument, LoraplexError
from gpu_worker.blob_cache import BlobCache
from gpu_worker.fetcher import Fetcher
from gpu_worker.metrics import WorkerMetrics
from loraplex.v1 import engine_pb2
from tests.adapter_store.conftest import StartStore
from tests.adapter_store.crafted import make_files
from tests.adapter_store.fakes import TENANT, StoreClient
from tests.adapter_store.redis_server import PATIENT_SECONDS, RedisServer

# What exists and is another tenant's, and what nobody has.
FOREIGN, UNKNOWN, NO_VERSION = "m", "n", "0" * 64
PAIRS = 1000
# Of a fair coin this is one run in a million.
MAX_DEVIATIONS = 5.0


async def fill(client: StoreClient) -> str:
    """The version of an adapter of ours. The other tenant has ids before and after it, and others have versions after
    it, so that a search for what is not there ends inside, as one for what is foreign does."""
    seeds: dict[str, int] = {}
    for seed in range(3):
        seeds[(await client.upload("a", make_files(seed), tenant="third", replace=True)).adapter.adapter_version] = seed
    for other_id in ("a", "z"):
        await client.upload(other_id, make_files(seeds[max(seeds)]), tenant="other")
    return (await client.upload(FOREIGN, make_files(seeds[min(seeds)]))).adapter.adapter_version


def calls_of(client: StoreClient, version: str) -> dict[str, Callable[[bool], Awaitable[object]]]:
    """Every call that names something; told whether what it names is foreign."""

    def name(foreign: bool) -> str:
        return FOREIGN if foreign else UNKNOWN

    def digest(foreign: bool) -> str:
        return version if foreign else NO_VERSION

    return {
        "get": lambda foreign: client.get(name(foreign), tenant="other"),
        "get-version": lambda foreign: client.get(name(foreign), digest(foreign), tenant="other"),
        "get-version-of-own-id": lambda foreign: client.get("a", digest(foreign), tenant="other"),
        "delete": lambda foreign: client.delete(name(foreign), tenant="other"),
        "delete-expected": lambda foreign: client.delete(
            name(foreign), expected_version=digest(foreign), tenant="other"
        ),
        "fetch": lambda foreign: client.fetch(digest(foreign), tenant="other"),
        "alias": lambda foreign: client.set_alias("b", digest(foreign), tenant="other"),
        "export": lambda foreign: client.export(name(foreign), tenant="other"),
        "upload-expected": lambda foreign: client.upload(
            name(foreign), make_files(9), expected_version=digest(foreign), tenant="other"
        ),
    }


async def answer_of(call: Awaitable[object]) -> str:
    """The whole error, without the names that the caller itself gave."""
    with pytest.raises(LoraplexError) as caught:
        await call
    error = caught.value
    text = f"{type(error).__name__} {error.reason} {error.message} {error.metadata} {error.retry_after_seconds}"
    return re.sub(rf"'{FOREIGN}'|'{UNKNOWN}'|[0-9a-f]{{64}}", "NAME", text)


async def test_c02_another_tenants_adapter_looks_like_none(client: StoreClient) -> None:
    for call in calls_of(client, await fill(client)).values():
        assert await answer_of(call(True)) == await answer_of(call(False))
    assert [adapter.adapter_id for adapter in (await client.page(tenant="other")).adapters] == ["a", "z"]


class Work:
    """What a store reads for its answers: statements on its index, the steps SQLite takes, questions to Redis."""

    def __init__(self) -> None:
        self.statements: list[str] = []
        self.steps = self.questions = 0

    async def watch(self, registry: IndexedRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
        def count_step() -> int:
            self.steps += 1
            return 0

        def attach() -> None:
            registry._index.db.set_trace_callback(self.statements.append)
            registry._index.db.set_progress_handler(count_step, 1)

        await registry._run(attach)
        if isinstance(registry, RedisRegistry):
            state = registry._link.state

            async def counted() -> Any:
                # The follower asks too, whatever the callers do.
                self.questions += asyncio.current_task() is not registry._follower
                return await state()

            monkeypatch.setattr(registry._link, "state", counted)

    async def of(self, call: Awaitable[object]) -> tuple[list[str], int, int]:
        self.statements.clear()
        self.steps = self.questions = 0
        await answer_of(call)
        return [re.sub(r"'[^']*'", "?", text) for text in self.statements], self.steps, self.questions


@pytest.mark.parametrize("registry", ["sqlite", "redis"])
async def test_c02_the_store_reads_no_more_for_what_exists(
    start_store: StartStore,
    redis_server: RedisServer,
    redis_prefix: str,
    monkeypatch: pytest.MonkeyPatch,
    registry: str,
) -> None:
    options = {"redis": redis_server.url, "redis_prefix": redis_prefix, "redis_timeout_seconds": PATIENT_SECONDS}
    service = await start_store(**(options if registry == "redis" else {}))
    async with connect(service.server.address) as channel:
        client, work = StoreClient(channel), Work()
        version = await fill(client)
        watched = service.store.registry
        assert isinstance(watched, IndexedRegistry)
        await work.watch(watched, monkeypatch)
        for name, call in calls_of(client, version).items():
            # The same sequence of reads before both.
            await answer_of(call(False))
            foreign, unknown = await work.of(call(True)), await work.of(call(False))
            assert foreign == unknown, name
            # What an id points to is decided in Redis when there is one.
            assert unknown[1] > 0 or name.startswith("delete")


async def test_c02_the_answer_takes_no_longer_for_what_exists(client: StoreClient) -> None:
    """A sign test over pairs: a busy machine slows both halves of a pair, so only a true difference decides it."""
    await fill(client)
    slower = 0
    for pair in range(PAIRS):
        seconds = {}
        for foreign in (pair % 2 == 0, pair % 2 == 1):
            started = time.perf_counter()
            with pytest.raises(LoraplexError):
                await client.get(FOREIGN if foreign else UNKNOWN, tenant="other")
            seconds[foreign] = time.perf_counter() - started
        slower += seconds[True] > seconds[False]
    assert abs(slower - PAIRS / 2) < MAX_DEVIATIONS * math.sqrt(PAIRS / 4)


async def test_c02_holds_where_the_bytes_are_already(
    client: StoreClient, service: StoreService, tmp_path: Path
) -> None:
    version, replies = await fill(client), asyncio.Queue[engine_pb2.EngineCommand]()
    cache = BlobCache(tmp_path / "cache", 2**30)
    fetcher = Fetcher(service.server.address, cache, WorkerMetrics(CollectorRegistry()), replies.put_nowait)
    answers = []
    for tenant, wanted in ((TENANT, version), ("other", version), ("other", NO_VERSION)):
        fetcher.fetch(engine_pb2.AdapterNeeded(tenant=tenant, adapter_version=wanted))
        answers.append(await asyncio.wait_for(replies.get(), timeout=60))
    await fetcher.close()
    cache.close()
    assert answers[0].HasField("adapter_fetched")
    foreign, unknown = (answer.adapter_fetch_failed.error for answer in answers[1:])
    assert foreign.reason == unknown.reason == "ADAPTER_NOT_FOUND"
    assert foreign.message.replace(version, NO_VERSION) == unknown.message


BAD_IDS = [
    "../x",
    "..%2f",
    "/etc/passwd",
    "a\0b",
    "a/../../b",
    "\\\\host\\share",
    "a\N{FRACTION SLASH}b",
    "a" * 4096,
    ".",
    "..",
    "a.",
    "a/",
    "A",
]

# Of what an audit hook hears, and how many of the arguments are paths.
_EVENTS = {"open": 1, "os.mkdir": 1, "os.remove": 1, "os.rmdir": 1, "os.listdir": 1, "os.scandir": 1, "os.chmod": 1}
_EVENTS |= {"os.rename": 2, "os.link": 2, "os.symlink": 2}
_touched: list[str] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    paths = arguments[: _EVENTS.get(event, 0)]
    _touched.extend(os.fsdecode(path) for path in paths if isinstance(path, str | bytes | os.PathLike))


@functools.cache
def _watched() -> None:
    """Once: a hook cannot be taken away again."""
    sys.addaudithook(_watch)


@pytest_asyncio.fixture(loop_scope="module")
async def touched(shared_client: StoreClient) -> list[str]:
    """Every path that this process opens, makes, moves, lists or removes. One upload has gone before."""
    await shared_client.upload("before", make_files(9))
    _watched()
    return _touched


@pytest.mark.parametrize("bad", BAD_IDS, ids=lambda bad: repr(bad[:20]))
@pytest.mark.asyncio(loop_scope="module")
async def test_c03_an_id_is_never_a_path(shared_client: StoreClient, touched: list[str], bad: str) -> None:
    files = make_files()
    touched.clear()
    for call in (
        shared_client.upload(bad, files),
        shared_client.get(bad),
        shared_client.delete(bad),
        shared_client.set_alias(bad, "0" * 64),
        shared_client.page(token=bad),
        shared_client.fetch(bad),
        shared_client.export(bad),
        shared_client.get("a", bad),
        shared_client.export("a", bad),
        shared_client.set_alias("a", bad),
        shared_client.set_alias("a", "0" * 64, expected_version=bad),
        shared_client.delete("a", expected_version=bad),
    ):
        with pytest.raises(InvalidArgument):
            await call
    assert touched == []


@pytest.mark.asyncio(loop_scope="module")
async def test_c03_an_id_that_is_taken_names_nothing_on_disk(
    shared_client: StoreClient, touched: list[str], shared_data_dir: Path
) -> None:
    files = make_files()
    touched.clear()
    await shared_client.upload("an-id_of.mine", files)
    await shared_client.export("an-id_of.mine")
    assert touched
    assert [path for path in touched if "an-id_of.mine" in path] == []
    assert [path for path in touched if not path.startswith(str(shared_data_dir))] == []


@pytest.mark.parametrize(("seed", "tenant"), [(20, "../x"), (21, "/etc/passwd"), (22, "a/../../b"), (23, "..")])
@pytest.mark.asyncio(loop_scope="module")
async def test_c03_a_tenant_names_nothing_on_disk(
    shared_client: StoreClient, touched: list[str], shared_data_dir: Path, seed: int, tenant: str
) -> None:
    files = make_files(seed)
    touched.clear()
    await shared_client.upload("a", files, tenant=tenant)
    assert touched
    assert [path for path in touched if tenant in path or not path.startswith(str(shared_data_dir))] == []
