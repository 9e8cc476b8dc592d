"""`make bench-store`: the adapter store with 10,000 adapters, and how fast one large adapter moves.

Metadata is an index in SQLite, so a page costs its rows; a watch resync costs one message for each adapter. Weights are
read, verified and sent in chunks of 1 MiB through gRPC, whose own copies cost more than both; a worker on the same
volume maps the file and pays for the copy and the verification only. An upload is hashed, written, synced, read again,
checked and packed before it is published.
"""

import asyncio
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.hardware import ROOT, commit, hardware
from benchmarks.store.measure import measure_metadata, measure_transfer

LIMITS = {"list_page_100_ms": 50.0, "watch_resync_seconds": 2.0, "start_warm_seconds": 5.0, "rss_mb": 300.0}
GOALS = {
    "upload_mb_per_second": 500.0,
    "fetch_1_reader_mb_per_second": 500.0,
    "fetch_8_readers_mb_per_second": 500.0,
}
MAPPED_SHARE_OF_CAT = 0.5


def tests_are_green() -> bool:
    """No number is reported of a store that is wrong."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", "tests/adapter_store"]
    return subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False).returncode == 0


def main() -> int:
    machine = hardware()
    if not tests_are_green():
        print("the store's tests are red: nothing is reported", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        figures = asyncio.run(measure_metadata(folder)) | asyncio.run(measure_transfer(folder))
    share = figures["mapped_and_verified_mb_per_second"] / figures["cat_mb_per_second"]
    over = [name for name, limit in LIMITS.items() if figures[name] > limit]
    missed = [name for name, goal in GOALS.items() if figures[name] < goal]
    missed += ["mapped_and_verified_share_of_cat"] if share < MAPPED_SHARE_OF_CAT else []
    for name, figure in figures.items():
        beside = LIMITS.get(name) or GOALS.get(name)
        print(f"{name:36} {figure:10.3f}" + (f"   ({beside:g})" if beside else ""), file=sys.stderr)
    line = {"bench": "store", "command": "make bench-store", "commit": commit(), **machine}
    line |= {name: round(figure, 3) for name, figure in figures.items()}
    line |= {"mapped_and_verified_share_of_cat": round(share, 3), "limits": LIMITS, "over_limit": over}
    print(
        json.dumps(
            line | {"goals": GOALS | {"mapped_and_verified_share_of_cat": MAPPED_SHARE_OF_CAT}, "goals_missed": missed}
        )
    )
    return 1 if over else 0


if __name__ == "__main__":
    raise SystemExit(main())
