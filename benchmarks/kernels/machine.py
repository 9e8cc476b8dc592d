"""What the machine can do, measured now, and what it is."""

import ctypes
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from kernels.cpu.library import vector_lanes

ROUNDS, CHAINS = 5_000_000, 12
READ_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Floors:
    """bytes_per_second: reading memory. flops_per_second: multiply-adds in registers, all threads, widest vectors."""

    bytes_per_second: float
    flops_per_second: float


def median_seconds(runs: list[Callable[[], object]], repeats: int) -> list[float]:
    """Median of each, the runs taking turns, so that a disturbance meets all of them."""
    seconds: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run()
    for _ in range(repeats):
        for index, run in enumerate(runs):
            started = time.perf_counter()
            run()
            seconds[index].append(time.perf_counter() - started)
    return [statistics.median(values) for values in seconds]


def measure_floors() -> Floors:
    data = torch.ones(READ_BYTES // 4)
    return Floors(READ_BYTES / _least_seconds(data.sum, 7), _flops_per_second())


def _least_seconds(run: Callable[[], object], repeats: int) -> float:
    """Of the run that nobody disturbed: what a machine can do is the most that it did."""
    run()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def compile_fma(out: Path, *options: str) -> None:
    """Raises CalledProcessError when there is no C++ compiler that takes it."""
    source = Path(__file__).with_name("fma.cpp")
    subprocess.run([os.environ.get("CXX", "g++"), "-O3", *options, "-o", str(out), str(source)], check=True)


def _flops_per_second() -> float:
    threads, lanes = torch.get_num_threads(), vector_lanes()
    with TemporaryDirectory() as folder:
        library = Path(folder) / "fma.so"
        compile_fma(library, "-fPIC", "-shared")
        loaded = ctypes.CDLL(str(library))
    loop = loaded.fma_sixteen if lanes == 16 else loaded.fma_eight
    loop.argtypes, loop.restype = [ctypes.c_int64], ctypes.c_float
    with ThreadPoolExecutor(threads) as pool:
        seconds = _least_seconds(lambda: list(pool.map(loop, [ROUNDS] * threads)), 15)
    return 2 * lanes * CHAINS * ROUNDS * threads / seconds


def hardware() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    fields = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "model\t"))]
    name = f"{fields[1]} model {fields[0]}" if len(fields) > 1 else platform.processor()
    return f"{name}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def commit() -> str:
    command = ["git", "-c", "safe.directory=*", "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
