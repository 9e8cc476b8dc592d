"""Writes the tables of docs/performance.md from the last run: `python -m benchmarks.kernels.report`."""

import json
from pathlib import Path
from typing import Any

from benchmarks.kernels.__main__ import RESULTS

PAGE = RESULTS.parents[2] / "docs" / "performance.md"
BEGIN, END = "<!-- kernels: begin -->", "<!-- kernels: end -->"
Row = dict[str, Any]


def tables(rows: list[Row]) -> str:
    first = rows[0]
    about = (
        f"{first['hardware']}; reads {first['read_gigabytes_per_second']} GB/s, multiplies "
        f"{first['peak_gigaflops']} GFLOP/s; commit {first['commit']}."
    )
    timed, errors = [row for row in rows if "case" in row], [row for row in rows if "worst_error" in row]
    return "\n\n".join([about, _times(timed), _errors(errors)])


def _times(rows: list[Row]) -> str:
    lines = [
        "| op | case | µs | share of floor | GB/s | GFLOP/s | reference / kernel |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["backend"] != "reference":
            numbers = (row["microseconds"], row["floor_share"], row["gigabytes_per_second"], row["gigaflops"])
            cells = [row["op"], row["case"], *numbers, row["ratio_to_reference"]]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _errors(rows: list[Row]) -> str:
    lines = ["| op | dtype | backend | worst error | share of its bound |", "|---|---|---|---|---|"]
    for row in rows:
        cells = [row["op"], row["dtype"], row["backend"], row["worst_error"], row["worst_share"]]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    rows = [json.loads(line) for line in Path(RESULTS).read_text().splitlines()]
    before, _, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n\n{tables(rows)}\n\n{END}{after}")


if __name__ == "__main__":
    main()
