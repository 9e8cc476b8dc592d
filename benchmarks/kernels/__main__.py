"""Times every kernel on every backend. Prints one JSON line a row, and nothing at all when the tests are red."""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.kernels.cases import Case, all_cases
from benchmarks.kernels.errors import error_rows
from benchmarks.kernels.machine import Floors, commit, hardware, measure_floors, median_seconds
from kernels import dispatch

RESULTS = Path(__file__).resolve().parent.parent / "results" / "kernels.jsonl"


def tests_pass() -> bool:
    return subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/kernels"], stdout=sys.stderr).returncode == 0


def time_case(case: Case, floors: Floors, repeats: int) -> list[dict[str, object]]:
    runs: list[Callable[[], object]] = []
    for backend in dispatch.CPU_BACKENDS:
        torch.manual_seed(0)
        with dispatch.force(backend):
            runs.append(_forced(backend, case.make()))
    seconds = median_seconds(runs, repeats)
    floor = max(case.read_bytes / floors.bytes_per_second, case.flops / floors.flops_per_second)
    return [
        {
            "op": case.op,
            "case": case.label,
            "backend": backend,
            "microseconds": round(1e6 * took, 1),
            "floor_share": round(floor / took, 3),
            "gigabytes_per_second": round(case.read_bytes / took / 1e9, 1),
            "gigaflops": round(case.flops / took / 1e9, 1),
            "ratio_to_reference": round(seconds[0] / took, 2),
        }
        for backend, took in zip(dispatch.CPU_BACKENDS, seconds, strict=True)
    ]


def _forced(backend: str, run: Callable[[], object]) -> Callable[[], object]:
    def forced() -> object:
        with dispatch.force(backend), torch.inference_mode():
            return run()

    return forced


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--op", help="only this operation")
    parser.add_argument("--repeats", type=int, default=11, help="runs of each; the median counts")
    options = parser.parse_args()
    if not tests_pass():
        sys.exit("the tests of the kernels are red: no number is worth reporting")
    floors = measure_floors()
    about = {
        "hardware": hardware(),
        "commit": commit(),
        "read_gigabytes_per_second": round(floors.bytes_per_second / 1e9, 1),
        "peak_gigaflops": round(floors.flops_per_second / 1e9, 1),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w") as file:
        for case in all_cases():
            if options.op in (None, case.op):
                for row in time_case(case, floors, options.repeats):
                    _emit(row | about, file.write)
        for row in error_rows():
            if options.op in (None, row["op"]):
                _emit(row | about, file.write)


def _emit(row: dict[str, object], write: Callable[[str], object]) -> None:
    line = json.dumps(row)
    print(line, flush=True)
    write(line + "\n")


if __name__ == "__main__":
    main()
