"""`loraplex memory`: bars whose lengths are right, and lines that a person and a pipe can read."""

from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex.command import main
from loraplex.commands.memory import BAR_CHARACTERS, share_bar
from loraplex.v1 import memory_pb2, memory_pb2_grpc, scheduler_pb2, scheduler_pb2_grpc, types_pb2

_Memory: Any = memory_pb2_grpc.MemoryServiceServicer
_Scheduler: Any = scheduler_pb2_grpc.SchedulerServiceServicer

USAGE = memory_pb2.GetUsageResponse(
    worker_id="worker-0",
    memory=scheduler_pb2.MemoryUsage(
        total_pages=96,
        kv_pages=24,
        prefix_pages=12,
        adapter_pages=48,
        free_pages=12,
        page_bytes=1 << 16,
        adapter_bytes=47 << 16,
        host_adapter_bytes=1 << 30,
        host_limit_bytes=2 << 30,
        host_adapters=40,
        fetching_adapters=2,
        pinned_adapters=1,
    ),
    resident_adapters=16,
    running_sequences=3,
    cache_limit_bytes=10 << 30,
)
RESIDENT = [
    scheduler_pb2.ResidentAdapter(adapter_version="b" * 64, tier=types_pb2.TIER_HOST, num_pages=3, loading=True),
    scheduler_pb2.ResidentAdapter(
        adapter_version="a" * 64,
        tier=types_pb2.TIER_PAGES,
        num_pages=3,
        num_bytes=3 << 16,
        pins=3,
        operator_pinned=True,
    ),
]


@pytest.fixture
def worker() -> Iterator[str]:
    """A scheduler and its one worker, on one address."""
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=2))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    info = scheduler_pb2.WorkerInfo(worker_id="worker-0", address=address)
    memory, scheduler = _Memory(), _Scheduler()
    memory.GetUsage = lambda request, context: USAGE
    memory.ListResident = lambda request, context: memory_pb2.ListResidentResponse(adapters=RESIDENT)
    scheduler.GetState = lambda request, context: scheduler_pb2.GetStateResponse(
        workers=[scheduler_pb2.WorkerSnapshot(info=info)]
    )
    memory_pb2_grpc.add_MemoryServiceServicer_to_server(memory, server)
    scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(scheduler, server)
    server.start()
    yield address
    server.stop(None)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert main(["memory", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


def test_the_pool_is_a_bar_of_its_kinds(worker: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "--worker", worker)
    bar = "K" * 12 + "P" * 6 + "A" * 24 + "." * 6
    assert lines[1].startswith(f"pages  [{bar}]  96 of 64.0 KiB: 24 kv, 12 prefix, 48 adapters")


def test_the_other_tiers_have_theirs(worker: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "--worker", worker)
    assert lines[2] == f"host   [{'#' * 24}{'.' * 24}]  1.0 GiB of 2.0 GiB  40 adapters"
    assert lines[3].endswith("0 B of 10.0 GiB  0 adapters")


def test_waste_and_what_is_on_its_way_are_said(worker: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = printed(capsys, "--worker", worker)[4]
    assert line == "16 adapters in pages, 1 pinned: 2.9 MiB, waste 2.1%; 2 being fetched, 0 being loaded"


def test_adapters_in_pages_come_first(worker: str, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = printed(capsys, "--worker", worker)[6:8]
    assert first.split() == ["a" * 12, "pages", "3", "192.0", "KiB", "2", "pinned"]
    assert second.split() == ["b" * 12, "host", "3", "0", "B", "0", "loading"]


def test_rows_that_are_left_out_are_counted(worker: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "--worker", worker, "--rows", "1")[-1] == "and 1 more"


def test_the_scheduler_names_the_workers(worker: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "--scheduler", worker)[0].startswith(f"worker-0  {worker}  3 running, 0 waiting")


def test_nothing_but_lines_goes_into_a_pipe(worker: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert not any("\x1b" in line for line in printed(capsys, "--worker", worker))


def test_nobody_at_the_address_is_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", "--once", "--worker", "127.0.0.1:1"]) == 1
    assert "127.0.0.1:1" in capsys.readouterr().err


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=6).filter(any))
def test_a_bar_is_always_as_long_and_shows_whoever_has_anything(counts: list[int]) -> None:
    bar = share_bar([(letter, count) for letter, count in zip("KPALQF", counts, strict=False)])
    assert len(bar) == BAR_CHARACTERS + 2
    assert {letter for letter, count in zip("KPALQF", counts, strict=False) if count} == set(bar) - set("[]")
