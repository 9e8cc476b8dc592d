"""What the page says follows from the rows: ratios within one run, limits beside them, what is missing is said."""

from typing import Any

import pytest

from benchmarks.kernels.models import SIZES
from benchmarks.serving.catalogue import ENTRIES, chosen
from benchmarks.serving.likeness import likeness
from benchmarks.serving.limits import ABLATIONS, OURS, PEERS, Line
from benchmarks.serving.report import cell, page, pair, single_lines, table, verdict
from benchmarks.serving.roofline import flops
from benchmarks.serving.workload import Request, Workload

BATCHED = next(line for line in PEERS if line.other == "peft")


def row(name: str, speed: float, run: str = "1", workload: str = "n8", model: str = "S", **more: Any) -> dict[str, Any]:
    entry = ENTRIES[name]
    latencies = dict.fromkeys(("ttft_p50_seconds", "ttft_p99_seconds", "itl_p50_seconds", "itl_max_seconds"), 0.01)
    return {
        "model": model,
        "workload": workload,
        "name": name,
        "system": entry.system,
        "mode": entry.mode,
        "tokens_per_second": speed,
        "tokens_per_second_quartiles": [speed, speed],
        "runs": 3,
        **latencies,
        "peak_rss_bytes": 1,
        "peak_share": 0.3,
        "peak_gigaflops": 100.0,
        "token_equal": True,
        "differing": 0,
        "run": f"2026-01-0{run}T00:00:00Z",
        "commit": "abc",
        "threads": 2,
        "hardware": {"cpu": "a CPU", "cores": 2, "memory_gib": 1.0, "like": ""},
        **more,
    }


def test_a_ratio_is_of_one_run_and_of_the_last_that_has_both() -> None:
    rows = [row("engine", 60, "1"), row("peft", 10, "1"), row("engine", 100, "2"), row("peft", 10, "3")]
    assert cell(rows, BATCHED, "S", "n8") == "**6.00** (5.9, goal 7.5) reached"
    rows += [row("engine", 80, "4"), row("peft", 10, "4")]
    assert cell(rows, BATCHED, "S", "n8") == "**8.00** (5.9, goal 7.5) goal"


def test_rows_of_different_runs_make_no_ratio() -> None:
    rows = [row("engine", 60, "1"), row("peft", 10, "2")]
    assert cell(rows, BATCHED, "S", "n8") == "not measured (5.9, goal 7.5)"


def test_a_missed_limit_is_said() -> None:
    assert cell([row("engine", 50), row("peft", 10)], BATCHED, "S", "n8").endswith("NOT reached")


def test_pools_of_other_sizes_are_other_measurements() -> None:
    line = next(line for line in ABLATIONS if line.other == "slots" and line.pool == 0.5)
    rows = [row(name, 10, workload="n64", pool_kv_share=1.0) for name in ("engine", "slots")]
    assert pair(rows, line, "S", "n64") is None
    rows += [row("engine", 30, workload="n64", pool_kv_share=0.5), row("slots", 10, workload="n64", pool_kv_share=0.5)]
    assert cell(rows, line, "S", "n64") == "**3.00** (1.2) reached"


def test_a_line_may_compare_two_workloads() -> None:
    line = next(line for line in OURS if line.one == "engine@distinct")
    rows = [row("engine", 80, workload="distinct"), row("engine", 100, workload="one")]
    assert cell(rows, line, "S", "distinct") == "**0.80** (0.9) NOT reached"


@pytest.mark.parametrize(
    ("value", "bounds", "cost", "said"),
    [
        (5.9, (5.9, 7.5), False, "reached"),
        (5.89, (5.9, 7.5), False, "NOT reached"),
        (7.5, (5.9, 7.5), False, "goal"),
        (1.3, (1.3, 1.2), True, "reached"),
        (1.31, (1.3, 1.2), True, "NOT reached"),
        (1.2, (1.3, 1.2), True, "goal"),
        (0.96, (1.0, 1.0), False, "reached"),
        (0.94, (1.0, 1.0), False, "NOT reached"),
        (0.89, (0.9, 0.9), False, "NOT reached"),
    ],
)
def test_a_verdict_knows_limits_goals_costs_and_noise(
    value: float, bounds: tuple[float, float], cost: bool, said: str
) -> None:
    assert verdict(value, bounds, cost) == said


def test_every_line_names_systems_that_exist_and_has_a_column() -> None:
    for line in (*PEERS, *OURS, *ABLATIONS):
        assert {side.partition("@")[0] for side in (line.one, line.other)} <= ENTRIES.keys()
        assert line.bounds.keys() <= {(m, w) for m in SIZES for w in ("n5", "n8", "n64", "distinct")}
    empty = table([], [Line("x", "engine", "peft", {("S", "n8"): (1, 2)})], "over")
    assert "| x | not measured (1, goal 2) |" in empty


def test_the_page_has_every_table_and_row() -> None:
    rows = [row(name, 10, workload="n64", model=model) for model in "SM" for name in ("engine", "stream", "peft")]
    text = page(rows)
    assert text.count("| M | n64 |") == 3
    assert "30.0% of the 100 GFLOP/s" in text
    assert "Longest wait for a token" in single_lines(rows)


def test_an_unknown_system_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'vlm' is no system; known: engine, lora-off"):
        chosen("engine,vlm")


def test_peft_far_from_its_known_figures_is_said() -> None:
    on_milan = "AMD EPYC-Milan Processor"
    assert "within 25%" in likeness([row("peft", 400)], on_milan, 2)
    assert "Trust no ratio" in likeness([row("peft", 100)], on_milan, 2)
    assert "another processor" in likeness([row("peft", 100)], "Intel(R) Xeon(R)", 2)
    assert likeness([row("engine", 100)], on_milan, 2) == ""


def test_work_is_counted_by_hand_for_one_request() -> None:
    size = SIZES["S"]
    base = Workload("x", 0, (Request(-1, (3, 4), 2),))
    weights = 4 * (256 * 256 * 2 + 256 * 128 * 2 + 3 * 256 * 688)
    # 3 tokens go through the layers; they attend to 1, 2 and 3 tokens; the head is used twice
    assert flops(size, base) == 2.0 * (3 * weights + 2 * 256 * 2048 + 4 * 2 * 256 * 6)
    # rank 8 on q, k, v, o: rows of A and B
    adapter = Workload("x", 1, (Request(0, (3, 4), 2),))
    assert flops(size, adapter) - flops(size, base) == 2.0 * 3 * 4 * 8 * (512 + 384 + 384 + 512)
