"""`loraplex explain` prints the scheduler's sentences."""

from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest

from loraplex.command import main
from loraplex.v1 import scheduler_pb2, scheduler_pb2_grpc

_Servicer: Any = scheduler_pb2_grpc.SchedulerServiceServicer


@pytest.fixture
def scheduler() -> Iterator[str]:
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=1))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    servicer = _Servicer()
    servicer.Explain = lambda request, context: scheduler_pb2.ExplainResponse(
        sentences=[f"Request {request.request_id} waits.", "No worker is ready."]
    )
    scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(servicer, server)
    server.start()
    yield address
    server.stop(None)


def test_the_sentences_are_printed_one_a_line(scheduler: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "r1", "--scheduler", scheduler]) == 0
    assert capsys.readouterr().out.splitlines() == ["Request r1 waits.", "No worker is ready."]


def test_nobody_at_the_address_is_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "r1", "--scheduler", "127.0.0.1:1"]) == 1
    assert "UNREACHABLE" in capsys.readouterr().err
