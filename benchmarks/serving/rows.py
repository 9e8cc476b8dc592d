"""One row a system and workload: medians over the runs."""

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.serving.catalogue import Entry
from benchmarks.serving.outcome import Outcome
from benchmarks.serving.workload import Workload

Row = dict[str, Any]


def row(model: str, workload: Workload, name: str, entry: Entry, outcomes: Sequence[Outcome], wrong: int) -> Row:
    """`name` is the system as one types it; `about` of the run is added by the caller."""
    speeds = [outcome.tokens_per_second for outcome in outcomes]
    return {
        "model": model,
        "workload": workload.name,
        "adapters": workload.adapters,
        "distinct": workload.distinct,
        "name": name,
        "system": entry.system,
        "mode": entry.mode,
        "tokens_per_second": round(statistics.median(speeds), 2),
        "tokens_per_second_quartiles": [round(float(value), 2) for value in np.percentile(speeds, [25, 75])],
        "runs": len(outcomes),
        "output_tokens": workload.output_tokens,
        "ttft_p50_seconds": _median([outcome.ttft_seconds(50) for outcome in outcomes]),
        "ttft_p99_seconds": _median([outcome.ttft_seconds(99) for outcome in outcomes]),
        "itl_p50_seconds": _median([outcome.itl_seconds(50) for outcome in outcomes]),
        "itl_max_seconds": _median([outcome.itl_seconds(100) for outcome in outcomes]),
        "peak_rss_bytes": max(outcome.peak_rss_bytes for outcome in outcomes),
        # of the most disturbed run, and of the run in the middle
        "neighbour_cores_max": round(max(outcome.neighbour_cores for outcome in outcomes), 3),
        "neighbour_cores": round(statistics.median(outcome.neighbour_cores for outcome in outcomes), 3),
        "token_equal": wrong == 0,
        "differing": wrong,
    }


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(statistics.median(known), 6) if known else None
