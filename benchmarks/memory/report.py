"""Writes the memory part of docs/performance.md from the last run: `python -m benchmarks.memory.report`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results" / "memory.jsonl"
BEGIN, END = "<!-- memory: begin -->", "<!-- memory: end -->"
WAIT_PLOT = "\n\n![Time to the first token by adapters in play](images/memory-wait.svg)"
EVICTION_PLOT = "\n\n![Miss-seconds against LRU](images/memory-eviction.svg)"
Row = dict[str, Any]


def section(rows: Sequence[Row]) -> str:
    """Tables of every part that was measured."""
    makers = {"wait": _wait, "reserve": _reserve, "shares": _shares, "eviction": _eviction}
    parts = [make([row for row in rows if row["part"] == part]) for part, make in makers.items()]
    return "\n\n".join(part for part in parts if part)


def _about(rows: Sequence[Row]) -> str:
    hardware = rows[0]["hardware"]
    machine = f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['memory_gib']} GiB"
    return f"`{rows[0]['command']}`, {machine}, commit {rows[0]['commit']}."


def _table(header: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)


def _wait(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    names = [
        "load / step",
        "popularity",
        "in play / fit",
        "system",
        "TTFT p50 ms",
        "p99 ms",
        "x own 1x",
        "adapter wait p50 ms",
    ]
    names += ["p90 ms", "sum s", "runs", "loads", "mean step ms"]
    lines = []
    for row in rows:
        growth = row["ttft_p50_growth"]
        cells = [
            row["load_to_step_ratio"],
            row["popularity"],
            f"{row['multiple']}x",
            row["system"],
            row["ttft_p50_ms"],
            row["ttft_p99_ms"],
        ]
        cells += [f"{growth:.2f}" if growth else "-"]
        cells += [row["adapter_wait_p50_ms"], row["adapter_wait_p90_ms"], row["adapter_wait_seconds"]]
        lines.append([*cells, row["runs"], row["loads"], row["step_mean_ms"]])
    rate = f"{rows[0]['requests_per_second']} requests/s, 70 % of {rows[0]['capacity_requests_per_second']}"
    step = f"a decode step takes {rows[0]['decode_step_ms']} ms"
    return (
        f"**Time to the first token.** {_about(rows)} {rate}; {step}; {rows[0]['requests']} requests a run; "
        "medians of the runs, *x own 1x* of the quotients round by round.\n\n" + _table(names, lines) + WAIT_PLOT
    )


def _reserve(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    lines = [
        [
            row["model"],
            row["adapters"],
            f"{row['kv_tokens_left']:,}",
            f"{row['kv_tokens_left_padded']:,}",
            row["ratio"] or "-",
        ]
        for row in rows
    ]
    names = ["model", "adapters", "KV tokens left", "beside padded slots", "ratio"]
    return (
        f"**Tokens of KV left in 40 GiB** beside adapters of ranks 8, 16, 32, 64 in turn. {_about(rows)}\n\n"
        + _table(names, lines)
    )


def _shares(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    phases: dict[tuple[int, int], list[Row]] = {}
    number, before = 0, None
    for row in rows:
        number += row["active_adapters"] != before
        before = row["active_adapters"]
        phases.setdefault((number, row["active_adapters"]), []).append(row)
    lines = []
    for (_, active), own in phases.items():
        last = own[len(own) // 2 :]
        means = [f"{sum(row[kind] for row in last) / len(last):.1%}" for kind in ("kv", "prefix", "adapters", "free")]
        lines.append([active, *means])
    text = f"**Shares of the pool** in the second half of each phase. {_about(rows)}\n\n"
    picture = "\n\n![Shares of the pool](images/memory-shares.svg)"
    return text + _table(["adapters in play", "KV", "prefix", "adapters", "free"], lines) + picture


def _eviction(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    cases: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        cases.setdefault((row["requests"], row["trace"]), []).append(row)
    lines = []
    for (requests, trace), own in cases.items():
        joint = " / ".join(str(row["joint_miss_seconds"]) for row in own)
        lru = " / ".join(str(row["lru_miss_seconds"]) for row in own)
        lines.append([requests, trace, joint, lru, f"{min(row['fewer'] for row in own):.1%}"])
    names = ["requests", "popularity of 200 adapters", "joint, s", "LRU, s", "fewer, the worst seed"]
    return f"**Miss-seconds**, a seed each. {_about(rows)}\n\n" + _table(names, lines) + EVICTION_PLOT


def main() -> None:
    rows = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n\n{section(rows)}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
