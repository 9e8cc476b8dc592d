"""Writes docs/performance.md from benchmarks/results: `python -m benchmarks.serving.report`, or `make bench-report`.

A ratio is always of two medians of one run. Where a line was measured more than once, the last run counts.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.hardware import ROOT
from benchmarks.serving.catalogue import ENTRIES
from benchmarks.serving.limits import ABLATIONS, HELD_SECONDS, HOP_SECONDS, NOISE, OURS, PEERS, ROOFLINE_M, Line
from benchmarks.serving.outcome import QUIET

RESULTS = ROOT / "benchmarks" / "results" / "serving.jsonl"
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- serving: begin -->", "<!-- serving: end -->"
Row = dict[str, Any]


def find(rows: Sequence[Row], run: str, model: str, workload: str, name: str, pool: float | None) -> Row | None:
    wanted = run, model, workload, name, pool
    for row in reversed(rows):
        if (row["run"], row["model"], row["workload"], row["name"], row.get("pool_kv_share")) == wanted:
            return row
    return None


def pair(rows: Sequence[Row], line: Line, model: str, workload: str) -> tuple[Row, Row] | None:
    """The two rows of a line from the last run that has both."""
    sides = [side.partition("@") for side in (line.one, line.other)]
    for run in sorted({row["run"] for row in rows}, reverse=True):
        one, other = (find(rows, run, model, at or workload, name, line.pool) for name, _, at in sides)
        if one and other:
            return one, other
    return None


def verdict(value: float, bounds: tuple[float, float], cost: bool) -> str:
    must, goal = bounds
    if cost:
        return "goal" if value <= goal else "reached" if value <= must else "NOT reached"
    # Only a bound of 1 means "not below"; noise is no failure there.
    slack = NOISE if must == 1 else 0.0
    return "goal" if value >= goal and goal > must else "reached" if value >= must - slack else "NOT reached"


def cell(rows: Sequence[Row], line: Line, model: str, workload: str) -> str:
    if (model, workload) not in line.bounds:
        return ""
    must, goal = line.bounds[model, workload]
    wanted = f"{must:g}" if must == goal else f"{must:g}, goal {goal:g}"
    found = pair(rows, line, model, workload)
    if found is None:
        return f"not measured ({wanted})"
    ratio = found[0]["tokens_per_second"] / found[1]["tokens_per_second"]
    return f"**{ratio:.2f}** ({wanted}) {verdict(ratio, (must, goal), line.cost)}"


def table(rows: Sequence[Row], lines: Sequence[Line], first: str) -> str:
    columns = list(dict.fromkeys(key for line in lines for key in line.bounds))
    columns.sort(key=lambda key: (key[0] == "M", key[1] != "n8"))
    text = [f"| {first} | " + " | ".join(f"{model} {workload}" for model, workload in columns) + " |"]
    text.append("|---" * (len(columns) + 1) + "|")
    for line in lines:
        name = line.text if line.pool is None else f"{line.text}, pool {line.pool:g}"
        text.append(f"| {name} | " + " | ".join(cell(rows, line, *key) for key in columns) + " |")
    return "\n".join(text)


def single_lines(rows: Sequence[Row]) -> str:
    """Lines that are no ratio of speeds."""
    found = []
    engines = [row for row in rows if row["model"] == "M" and row["name"] == "engine" and "pool_kv_share" not in row]
    for workload in ("n8", "n64"):
        if last := next((row for row in reversed(engines) if row["workload"] == workload), None):
            share = last["peak_share"]
            wanted = f"must {ROOFLINE_M[0]:.0%}, goal {ROOFLINE_M[1]:.0%}"
            found.append(
                f"- Multiply-adds on M {workload}: {share:.1%} of the {last['peak_gigaflops']:.0f} GFLOP/s that the"
                f" cores reach in registers ({wanted}): {verdict(share, ROOFLINE_M, False)}."
            )
    for model in ("S", "M"):
        line = Line("", "stream", "engine", {})
        if both := pair(rows, line, model, "solo"):
            cost = both[0]["itl_p50_seconds"] - both[1]["itl_p50_seconds"]
            reached = "reached" if cost <= HOP_SECONDS else "NOT reached"
            found.append(
                f"- One stream alone on {model}: {1000 * both[0]['itl_p50_seconds']:.1f} ms between tokens through the"
                f" fleet, {1000 * cost:+.1f} ms to the engine's (at most +{1000 * HOP_SECONDS:g}): {reached}."
            )
        if both := pair(rows, line, model, "n64"):
            more = both[0]["itl_max_seconds"] - both[1]["itl_max_seconds"]
            reached = "reached" if more <= HELD_SECONDS else "NOT reached"
            found.append(
                f"- Longest wait for a token of a running stream on {model} n64: {1000 * more:+.0f} ms to the engine's"
                f" (a token is held at most {1000 * HELD_SECONDS:g} ms): {reached}."
            )
    return "\n".join(found)


def figures(rows: Sequence[Row]) -> str:
    """The last measurement of everything."""
    last: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        last[row["model"], row["workload"], row.get("pool_kv_share"), row["name"]] = row
    names = list(ENTRIES)
    order = sorted(
        last.values(),
        key=lambda row: (
            row["model"] == "M",
            row["workload"],
            -row.get("pool_kv_share", 9.0),
            names.index(row["name"]),
        ),
    )
    text = [
        "| model | workload | pool | system | tokens/s (quartiles; runs) | first token p50, p99 ms | between tokens ms"
        " | peak MB | tokens as PEFT | others' cores | run, commit |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in order:
        quartiles = "-".join(f"{value:.0f}" for value in row["tokens_per_second_quartiles"])
        cells = [
            row["model"],
            row["workload"],
            f"{row['pool_kv_share']:g}" if "pool_kv_share" in row else "",
            f"{row['system']} {row['mode']}",
            f"{row['tokens_per_second']:.0f} ({quartiles}; {row['runs']})",
            f"{_ms(row['ttft_p50_seconds'])}, {_ms(row['ttft_p99_seconds'])}",
            _ms(row["itl_p50_seconds"], 1),
            f"{row['peak_rss_bytes'] / 1e6:.0f}",
            "yes" if row["token_equal"] else f"all but {row['differing']}",
            _others(row),
            f"{row['run'][5:16]}, {row['commit']}",
        ]
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text)


def _others(row: Row) -> str:
    """Cores that others kept busy in the most disturbed run; older rows do not know."""
    most = row.get("neighbour_cores_max")
    return "not known" if most is None else f"**{most:.2f}**" if most > QUIET else f"{most:.2f}"


def _ms(seconds: float | None, digits: int = 0) -> str:
    return "" if seconds is None else f"{1000 * seconds:.{digits}f}"


def page(rows: Sequence[Row]) -> str:
    machine = rows[-1]["hardware"]
    like = next((row["hardware"]["like"] for row in reversed(rows) if row["hardware"]["like"]), "")
    about = (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB; {rows[0]['run'][:10]} to"
        f" {rows[-1]['run'][:10]}; {rows[-1]['threads']} threads for every system. {like}"
    )
    return "\n\n".join(
        [
            about,
            "Our engine over each peer; bold is what was measured, then what it must be and should be.",
            table(rows, PEERS, "tokens per second over"),
            "Our systems among themselves.",
            table(rows, OURS, "ratio"),
            single_lines(rows),
            "![Tokens per second of each system](images/serving.svg)",
            "Our engine over baselines that have one part replaced, every pool of the same bytes: the KV of all"
            " requests times the number, and 16 adapters.",
            table(rows, ABLATIONS, "over"),
            *(
                ["![Tokens per second of the baselines as the pool shrinks](images/ablations.svg)"]
                if capped(rows)
                else []
            ),
            figures(rows),
        ]
    )


def capped(rows: Sequence[Row]) -> bool:
    """Some were measured in a pool of fixed bytes."""
    return any("pool_kv_share" in row for row in rows)


def read_rows(path: Path = RESULTS) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def main() -> None:
    if not RESULTS.exists():
        sys.exit("there are no rows yet: run `make bench` first")
    rows = read_rows()
    before, found, rest = PAGE.read_text().partition(BEGIN)
    if not found:
        sys.exit(f"{PAGE} has no {BEGIN}")
    PAGE.write_text(f"{before}{BEGIN}\n\n{page(rows)}\n\n{END}{rest.partition(END)[2]}")
    from benchmarks.serving import plots

    plots.draw(rows, PAGE.parent / "images")


if __name__ == "__main__":
    main()
