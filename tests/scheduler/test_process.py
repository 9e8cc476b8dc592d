"""`python -m scheduler` as a process: it says when it is ready, stays small, and stops on a signal."""

import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from loraplex.v1 import scheduler_pb2, scheduler_pb2_grpc

ROOT = Path(__file__).resolve().parents[2]
MAX_RESIDENT_BYTES = 150 * 1024 * 1024


@pytest.fixture
def process() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "scheduler", "--port", "0", "--metrics-port", "0", "--drain-seconds", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        yield started
        started.kill()


def address(process: subprocess.Popen[str]) -> str:
    """From the ready line."""
    assert process.stdout is not None
    service, name, grpc_address, metrics_address = process.stdout.readline().split()
    assert (service, name) == ("ready", "scheduler")
    assert metrics_address.startswith("metrics=127.0.0.1:")
    return grpc_address.removeprefix("grpc=")


def memory(pid: int) -> tuple[int, str]:
    """Resident bytes, and the names of mapped files; nothing where the system does not say."""
    folder = Path(f"/proc/{pid}")
    if not folder.is_dir():
        return 0, ""
    resident_pages = int((folder / "statm").read_text().split()[1])
    return resident_pages * resource.getpagesize(), (folder / "maps").read_text()


async def test_it_is_ready_small_and_free_of_torch(process: subprocess.Popen[str]) -> None:
    async with grpc.aio.insecure_channel(address(process)) as channel:
        stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)
        state = await stub.GetState(scheduler_pb2.GetStateRequest())
    assert state.scheduler_epoch > 1_700_000_000_000
    resident_bytes, mapped_files = memory(process.pid)
    assert resident_bytes < MAX_RESIDENT_BYTES
    assert "torch" not in mapped_files


def test_it_stops_on_a_signal(process: subprocess.Popen[str]) -> None:
    address(process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=100) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output-quantile", "2"], "output_quantile is 2.0, expected above 0 up to 1"),
        (["--port", "1", "--host", "256.0.0.1"], "cannot listen on 256.0.0.1:1"),
    ],
    ids=["setting", "address"],
)
def test_it_says_why_it_cannot_start(options: list[str], message: str) -> None:
    command = [sys.executable, "-m", "scheduler", "--metrics-port", "0", "--port", "0", *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_importing_it_loads_neither_torch_nor_transformers() -> None:
    code = "import scheduler.service, sys; print({'torch', 'transformers', 'numpy'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
