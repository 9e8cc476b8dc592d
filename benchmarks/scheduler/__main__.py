"""`make bench-scheduler`: what a decision costs, and what a saturated fleet of 64 workers costs a core.

The core is fed real messages, decoded and encoded as in the service, by workers that only pretend to compute: 50 steps
a second, 32 sequences each, a report a step. The queue is kept full with requests of as many adapters. A decision is
one call of `schedule()`; processor time is that of the scheduler alone. One JSON line a row; exit status 1 when a limit
is exceeded.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.hardware import ROOT, commit, hardware
from benchmarks.scheduler.load import Fleet
from benchmarks.scheduler.plot import growth_plot
from scheduler.core.settings import POLICIES

NUM_WORKERS = 64
SIMULATED_SECONDS = 4.0
SIZES = (1_000, 3_000, 10_000, 30_000)
LIMIT_SIZE = 10_000
DECISION_P99_LIMIT_SECONDS = 0.002
PROCESSOR_LIMIT = 0.6


def tests_are_green() -> bool:
    """No number is reported of a scheduler that decides wrongly."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", "tests/scheduler"]
    return subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False).returncode == 0


def measure(policy: str, num_waiting: int) -> dict[str, object]:
    """Fills the queue, then runs for some simulated seconds."""
    began = time.process_time()
    fleet = Fleet(NUM_WORKERS, num_waiting, policy)
    fill_seconds = time.process_time() - began
    fleet.decisions.clear()
    fleet.submissions.clear()
    fleet.busy_seconds, before = 0.0, fleet.simulated_seconds
    fleet.run(SIMULATED_SECONDS)
    decisions, submissions = sorted(fleet.decisions), sorted(fleet.submissions)
    return {
        "policy": policy,
        "workers": NUM_WORKERS,
        "waiting": num_waiting,
        "adapters": num_waiting,
        "running": sum(worker.num_running for worker in fleet.core.fleet.workers),
        "finished": sum(worker.finished for worker in fleet.workers),
        "decisions": len(decisions),
        "decision_p50_ms": _ms(decisions, 0.5),
        "decision_p99_ms": _ms(decisions, 0.99),
        "decision_max_ms": _ms(decisions, 1.0),
        "submit_p99_ms": _ms(submissions, 0.99),
        "processor_share": round(fleet.busy_seconds / (fleet.simulated_seconds - before), 3),
        "fill_seconds": round(fill_seconds, 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plot", type=Path, help="where to draw the growth")
    arguments = parser.parse_args()
    if not tests_are_green():
        print("the scheduler's tests are red: nothing is reported", file=sys.stderr)
        return 1
    about = {"bench": "scheduler", "command": "make bench-scheduler", "commit": commit(), **hardware()}
    failed = False
    growth = []
    for policy, size in [*(("fair", size) for size in SIZES), *((policy, LIMIT_SIZE) for policy in POLICIES[1:])]:
        row = measure(policy, size)
        if policy == "fair":
            growth.append((size, float(str(row["fill_seconds"]))))
        if size == LIMIT_SIZE:
            over = float(str(row["decision_p99_ms"])) > 1e3 * DECISION_P99_LIMIT_SECONDS
            row["over_limit"] = over or float(str(row["processor_share"])) > PROCESSOR_LIMIT
            failed |= bool(row["over_limit"])
        print(json.dumps(about | row), flush=True)
    (first, first_seconds), (last, last_seconds) = growth[0], growth[-1]
    allowed = first_seconds * last * math.log(last) / (first * math.log(first))
    print(json.dumps(about | {"growth": growth, "n_log_n_seconds": round(allowed, 3), "seconds": last_seconds}))
    if arguments.plot:
        arguments.plot.write_text(growth_plot(growth, str(about["commit"])))
    return 1 if failed or last_seconds > allowed else 0


def _ms(seconds: list[float], quantile: float) -> float:
    return round(1e3 * seconds[min(len(seconds) - 1, int(quantile * len(seconds)))], 3)


if __name__ == "__main__":
    raise SystemExit(main())
