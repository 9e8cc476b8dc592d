"""A real store on a real socket, its clock in the test's hand."""

import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from adapter_store.config import StoreConfig
from adapter_store.service import StoreService
from common.channel import connect
from tests.adapter_store.fakes import FakeClock, StoreClient
from tests.adapter_store.redis_server import RedisServer
from tests.adapter_store.tiny_base import write_base

GRACE_SECONDS = 600.0

_tenants, _prefixes = itertools.count(), itertools.count()

StartStore = Callable[..., Awaitable[StoreService]]


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
async def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
async def start_store(tmp_path: Path, data_dir: Path, clock: FakeClock) -> AsyncIterator[StartStore]:
    """Starts stores on `data_dir`, with options; all are stopped at the end, those already stopped too."""
    running: list[StoreService] = []

    async def start(**options: Any) -> StoreService:
        config = StoreConfig(data_dir=data_dir, delete_grace_seconds=GRACE_SECONDS, drain_seconds=1.0, **options)
        service = StoreService(config, clock)
        clock.sleeping.clear()
        await service.start()
        running.append(service)
        await clock.sleeping.wait()
        return service

    yield start
    for service in running:
        await service.stop()


@pytest.fixture
async def service(start_store: StartStore, tmp_path: Path) -> StoreService:
    return await start_store(model=write_base(tmp_path))


@pytest.fixture
async def client(service: StoreService) -> AsyncIterator[StoreClient]:
    channel = connect(service.server.address)
    yield StoreClient(channel)
    await channel.close()


@pytest.fixture(scope="module")
def shared_data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared") / "store"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_service(shared_data_dir: Path) -> AsyncIterator[StoreService]:
    """A store for the tests of one file; its clock stands still."""
    config = StoreConfig(data_dir=shared_data_dir, model=write_base(shared_data_dir.parent), drain_seconds=1.0)
    service = StoreService(config, FakeClock())
    await service.start()
    yield service
    await service.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_channel(shared_service: StoreService) -> AsyncIterator[grpc.aio.Channel]:
    channel = connect(shared_service.server.address)
    yield channel
    await channel.close()


@pytest.fixture
def shared_client(shared_channel: grpc.aio.Channel) -> StoreClient:
    """A tenant of its own for each test."""
    return StoreClient(shared_channel, f"tenant-{next(_tenants)}")


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A server for tests that do it no harm; each takes keys of its own. Prints its version."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    print(f"redis-server {server.version}")
    yield server
    server.stop()


@pytest.fixture
def redis_prefix() -> str:
    """Keys of the test's own."""
    return f"test-{next(_prefixes)}"


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A server that the test may kill, pause or spoil."""
    server = RedisServer(tmp_path / "redis")
    server.start()
    yield server
    server.stop()
