"""The device that is tested or measured: what it is, what it can copy and multiply, how long a call takes."""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks.hardware import commit

NO_DEVICE = (
    "there is no CUDA device here; `--device cpu` runs the same code at tiny shapes in Triton's interpreter, "
    "which says nothing about speed"
)
COPY_BYTES, MULTIPLY_SIZE = 1 << 30, 8192


def open_device(name: str) -> torch.device:
    """Ends the process with one sentence and exit code 1 when there is no such device."""
    if name == "cuda" and not torch.cuda.is_available():
        sys.exit(NO_DEVICE)
    return torch.device(name)


@dataclass(frozen=True, slots=True)
class Floors:
    """What the device does at best, measured now: bytes read or written, and bfloat16 multiply-adds counted twice."""

    bytes_per_second: float
    flops_per_second: float

    def seconds(self, num_bytes: float, flops: float) -> float:
        return max(num_bytes / self.bytes_per_second, flops / self.flops_per_second)


def measure_floors(device: torch.device) -> Floors:
    is_gpu = device.type == "cuda"
    size, side = (COPY_BYTES, MULTIPLY_SIZE) if is_gpu else (1 << 20, 64)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    to = torch.empty_like(source)
    matrix = torch.ones(side, side, dtype=torch.bfloat16, device=device)
    copied = seconds_of([lambda: to.copy_(source)], device)
    multiplied = seconds_of([lambda: matrix @ matrix], device)
    return Floors(2 * size / copied, 2 * side**3 / multiplied)


def seconds_of(calls: Sequence[Callable[[], object]], device: torch.device, repeats: int = 20) -> float:
    """Median seconds of one of `calls`, which follow each other as the layers of a model do.

    On a GPU they are captured into one graph, as a decode step is, so that the launches of Python do not count.
    """
    if device.type != "cuda":
        started = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - started) / len(calls)
    return _graph_seconds(calls, repeats) / len(calls)


def _graph_seconds(calls: Sequence[Callable[[], object]], repeats: int) -> float:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return events_median(graph.replay, repeats)


def events_median(call: Callable[[], object], repeats: int) -> float:
    """Median seconds of `call` on the current stream, after three that do not count."""
    for _ in range(3):
        call()
    marks = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        marks.append((begin, end))
    torch.cuda.synchronize()
    return float(statistics.median(begin.elapsed_time(end) / 1e3 for begin, end in marks))


def about(device: torch.device) -> dict[str, object]:
    """What every row carries."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "Triton's interpreter on a CPU"
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    when = datetime.now(UTC).date().isoformat()
    return {"device": name, "torch": torch.__version__, "triton": triton, "commit": commit(), "date": when}
