"""`make bench-store`: the adapter store with 10,000 adapters, and how fast one large adapter moves.

Metadata is an index in SQLite, so a page costs its rows; a watch resync costs one message for each adapter. Weights are
read, verified and sent in chunks of 1 MiB through gRPC, whose own copies cost more than both; a worker on the same
volume maps the file and pays for the copy and the verification only. An upload is hashed, written, synced, read again,
checked and packed before it is published. Refusals are timed beside the limits of the rows they belong to.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.hardware import ROOT, commit, hardware
from benchmarks.store.faults import measure_names, measure_redis, measure_store_away
from benchmarks.store.measure import measure_metadata, measure_transfer

PARTS = {
    "metadata": (measure_metadata,),
    "transfer": (measure_transfer,),
    "faults": (measure_names, measure_redis, measure_store_away),
}
LIMITS = {
    "list_page_100_ms": 50.0,
    "watch_resync_seconds": 2.0,
    "start_warm_seconds": 5.0,
    "rss_mb": 300.0,
    "c02_foreign_difference_share": 0.1,
    # One run in a million of a fair coin.
    "c02_sign_test_deviations": 5.0,
    "b11_redis_down_refused_ms": 300.0,
    "b11_redis_back_seconds": 2.0,
    "b12_redis_paused_blocked_ms": 200.0,
    "b15_store_away_refused_seconds": 1.0,
}
GOALS = {
    "upload_mb_per_second": 500.0,
    "fetch_1_reader_mb_per_second": 500.0,
    "fetch_8_readers_mb_per_second": 500.0,
    "mapped_and_verified_share_of_cat": 0.5,
}


def tests_are_green() -> bool:
    """No number is reported of a store that is wrong."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", "tests/adapter_store"]
    return subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.store")
    parser.add_argument("--part", choices=PARTS, action="append", help="of the rows; may be given again [all]")
    parts = parser.parse_args().part or list(PARTS)
    machine = hardware()
    if not tests_are_green():
        print("the store's tests are red: nothing is reported", file=sys.stderr)
        return 1
    figures: dict[str, float] = {}
    for part in parts:
        for measure in PARTS[part]:
            with tempfile.TemporaryDirectory() as name:
                figures |= asyncio.run(measure(Path(name)))
    if "cat_mb_per_second" in figures:
        share = figures["mapped_and_verified_mb_per_second"] / figures["cat_mb_per_second"]
        figures["mapped_and_verified_share_of_cat"] = share
    over = [name for name, limit in LIMITS.items() if figures.get(name, 0.0) > limit]
    missed = [name for name, goal in GOALS.items() if name in figures and figures[name] < goal]
    for name, figure in figures.items():
        beside = LIMITS.get(name) or GOALS.get(name)
        print(f"{name:36} {figure:10.3f}" + (f"   ({beside:g})" if beside else ""), file=sys.stderr)
    line = {"bench": "store", "command": "make bench-store", "parts": parts, "commit": commit(), **machine}
    line |= {name: round(figure, 3) for name, figure in figures.items()}
    print(json.dumps(line | {"limits": LIMITS, "over_limit": over, "goals": GOALS, "goals_missed": missed}))
    return 1 if over else 0


if __name__ == "__main__":
    raise SystemExit(main())
