"""Tiers, prefetch, pool and eviction, measured; one JSON line a row. Refuses when the tests of these are red.

capacity   (a)       requests a second with 1x to 8x the adapters that fit; the real engine
wait       (a), (e)  time to the first token at 70 % of the capacity with 1x; the real engine, minutes
reserve    (b)       tokens of KV left beside padded slots
shares     (c)       who has the pool while 1, 200, 1 adapters are in play
eviction   (d)       joint eviction against LRU
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.hardware import ROOT, commit, hardware
from benchmarks.memory import replay, serve
from benchmarks.memory.fixture import checkpoint_and_adapters
from benchmarks.memory.report import RESULTS

PARTS = ("capacity", "wait", "reserve", "shares", "eviction")
TESTS = ("tests/gpu_worker/memory", "tests/gpu_worker/test_prefetch.py", "tests/gpu_worker/test_host_tier.py")


def main() -> None:
    default = serve.Options()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=PARTS, action="append", help="only this; may be repeated")
    parser.add_argument("--seconds", type=float, default=default.seconds, help="of arrivals in a run of `wait`")
    parser.add_argument("--rounds", type=int, default=default.rounds, help="runs of each case of `wait`")
    parser.add_argument(
        "--compared-rounds", type=int, default=default.compared_rounds, help="of the cases that a goal compares"
    )
    parser.add_argument("--system", action="append", choices=serve.SYSTEMS, help="default all")
    parser.add_argument("--ratio", type=float, action="append", help="load seconds / step seconds; default 0.25 and 5")
    parser.add_argument("--multiple", type=int, action="append", choices=serve.MULTIPLES, help="default all")
    parser.add_argument("--popularity", action="append", choices=list(serve.POPULARITIES), help="default all")
    parser.add_argument("--turns", type=int, default=4000, help="requests of each trace of `eviction`")
    parser.add_argument(
        "--plot", action="store_true", help="draw what was measured into docs/images (needs matplotlib)"
    )
    options = parser.parse_args()
    parts = options.part or PARTS
    if subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *TESTS], cwd=ROOT, stdout=sys.stderr, check=False
    ).returncode:
        sys.exit("the tests of the memory manager are red: no number is worth reporting")
    about = {"hardware": hardware(), "commit": commit(), "command": " ".join(["make bench-memory", *_arguments()])}
    rows, started = list[dict[str, Any]](), time.perf_counter()
    for part in parts:
        measured = [row | about for row in _measure(part, options)]
        for row in measured:
            print(json.dumps(row), flush=True)
        print(f"{part}: done after {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        rows += measured
    _keep(rows)
    if options.plot:
        from benchmarks.memory.plots import draw

        draw(rows, ROOT / "docs" / "images")


def _arguments() -> list[str]:
    return [f"ARGS='{' '.join(sys.argv[1:])}'"] if sys.argv[1:] else []


def _measure(part: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    if part == "reserve":
        return replay.reserve_rows()
    if part == "shares":
        return replay.share_rows()
    if part == "eviction":
        return replay.eviction_rows(options.turns)
    chosen = serve.Options(
        seconds=options.seconds,
        rounds=options.rounds,
        compared_rounds=options.compared_rounds,
        systems=options.system or serve.SYSTEMS,
        ratios=options.ratio or serve.RATIOS,
        multiples=options.multiple or serve.MULTIPLES,
        popularities=options.popularity or list(serve.POPULARITIES),
    )
    with checkpoint_and_adapters(serve.FITTING * max(serve.MULTIPLES)) as (base, adapters):
        return (serve.rows if part == "wait" else serve.capacity_rows)(base, adapters, chosen)


def _keep(rows: Sequence[dict[str, Any]]) -> None:
    """Rows of parts that were not measured now stay; so do those of another case."""

    def case(row: dict[str, Any]) -> tuple[object, ...]:
        return tuple(row.get(name) for name in ("part", "load_to_step_ratio", "popularity", "multiple"))

    measured = {case(row) for row in rows}
    old = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    kept = [line for line in old if case(json.loads(line)) not in measured]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("\n".join([*kept, *(json.dumps(row) for row in rows)]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
