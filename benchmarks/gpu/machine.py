"""The device that is tested or measured: what it is, what it can read, copy and multiply, how long a call takes."""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks.hardware import commit

NO_DEVICE = (
    "there is no CUDA device here; `--device cpu` runs the same code at tiny shapes in Triton's interpreter, "
    "which says nothing about speed"
)
FLOOR_BYTES, MULTIPLY_SIZE = 1 << 30, 8192


def open_device(name: str) -> torch.device:
    """Ends the process with one sentence and exit code 1 when there is no such device."""
    if name == "cuda" and not torch.cuda.is_available():
        sys.exit(NO_DEVICE)
    return torch.device(name)


@dataclass(frozen=True, slots=True)
class Floors:
    """What the device does at best, measured now. A copy counts what it reads and what it writes; products are of
    bfloat16, a multiply-add counted twice."""

    read_bytes_per_second: float
    copy_bytes_per_second: float
    flops_per_second: float

    def seconds(self, num_bytes: float, flops: float) -> float:
        """At least, when bytes and products overlap perfectly."""
        return max(num_bytes / self.read_bytes_per_second, flops / self.flops_per_second)


def measure_floors(device: torch.device) -> Floors:
    is_gpu = device.type == "cuda"
    size, side = (FLOOR_BYTES, MULTIPLY_SIZE) if is_gpu else (1 << 20, 64)
    source = torch.ones(size // 4, device=device)
    to = torch.empty_like(source)
    # random: a product of ones draws less power and runs at a higher clock
    matrix = torch.randn(side, side, device=device).to(torch.bfloat16)
    read = seconds_of([source.sum], device)
    copied = seconds_of([partial(to.copy_, source)], device)
    multiplied = seconds_of([partial(torch.matmul, matrix, matrix)], device)
    return Floors(size / read, 2 * size / copied, 2 * side**3 / multiplied)


def seconds_of(calls: Sequence[Callable[[], object]], device: torch.device, repeats: int = 20) -> float:
    """Median seconds of one of `calls`, which follow each other as the layers of a model do.

    On a GPU they are captured into one graph, as a decode step is, so that the launches of Python do not count. Each
    replay begins with a second-level cache that holds nothing of theirs: a call that reads what none before it has read
    finds it in memory, whatever its size.
    """
    if device.type == "cuda":
        return events_median(_captured(calls), device, repeats) / len(calls)
    return _wall_seconds(calls) / len(calls)


def step_seconds(step: Callable[[], object], device: torch.device, repeats: int = 20) -> float:
    """Median seconds of a whole step, launched as it is; Python counts where it is slower than the device."""
    return events_median(step, device, repeats) if device.type == "cuda" else _wall_seconds([step])


def _wall_seconds(calls: Sequence[Callable[[], object]]) -> float:
    started = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - started


def _captured(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def events_median(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds of `call` on the current stream, each with a cold cache, after three that do not count."""
    flush = _flusher(device)
    for _ in range(3):
        call()
    marks = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush()
        begin.record()
        call()
        end.record()
        marks.append((begin, end))
    torch.cuda.synchronize()
    return float(statistics.median(begin.elapsed_time(end) / 1e3 for begin, end in marks))


@cache
def _flusher(device: torch.device) -> Callable[[], object]:
    """Reads twice what the second-level cache holds. It does not write: written lines would have to be carried out of
    the cache while the next call is timed."""
    size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    return torch.zeros(size // 4, device=device).sum


def about(device: torch.device) -> dict[str, object]:
    """What every row carries."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "Triton's interpreter on a CPU"
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    when = datetime.now(UTC).date().isoformat()
    return {"device": name, "torch": torch.__version__, "triton": triton, "commit": commit(), "date": when}
