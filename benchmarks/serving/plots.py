"""Pictures of docs/performance.md; needs matplotlib, which nothing else does."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")

from matplotlib import pyplot as plt

from benchmarks.serving.catalogue import ENTRIES

Row = dict[str, Any]
# The same picture from the same rows.
mpl.rcParams.update({"svg.hashsalt": "loraplex", "svg.fonttype": "none", "font.size": 9})
COLOURS = {"loraplex": "#2a6f97", "peft": "#bc6c25", "vllm": "#6a994e", "llama.cpp": "#7f5539", "baseline": "#adb5bd"}
ABLATIONS = ("engine", "eager", "padded-bmm", "divided", "slots", "merge")


def draw(rows: Sequence[Row], folder: Path) -> None:
    _save(_systems(rows), folder / "serving.svg")
    if any("pool_kv_share" in row for row in rows):
        _save(_ablations(rows), folder / "ablations.svg")


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)
    # matplotlib leaves spaces at the ends of lines
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


def _last(rows: Sequence[Row], model: str, workload: str, name: str, pool: float | None) -> Row | None:
    return next(
        (
            row
            for row in reversed(rows)
            if (row["model"], row["workload"], row["name"]) == (model, workload, name)
            and row.get("pool_kv_share") == pool
        ),
        None,
    )


def _systems(rows: Sequence[Row]) -> Any:
    figure, axes = plt.subplots(2, 2, figsize=(9, 5))
    for axis, (model, workload) in zip(axes.flat, (("S", "n8"), ("S", "n64"), ("M", "n8"), ("M", "n64")), strict=True):
        found = [(name, _last(rows, model, workload, name, None)) for name in reversed(ENTRIES)]
        bars = [(name, row) for name, row in found if row]
        speeds = [row["tokens_per_second"] for _, row in bars]
        axis.barh([name for name, _ in bars], speeds, color=[COLOURS[row["system"]] for _, row in bars])
        for place, speed in enumerate(speeds):
            axis.text(speed, place, f" {speed:.0f}", va="center")
        axis.set_title(f"{model}, {workload[1:]} adapters: output tokens per second")
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


def _ablations(rows: Sequence[Row]) -> Any:
    models = [model for model in ("S", "M") if any(row["model"] == model and "pool_kv_share" in row for row in rows)]
    figure, axes = plt.subplots(1, max(1, len(models)), figsize=(4.5 * max(1, len(models)), 3), squeeze=False)
    for axis, model in zip(axes.flat, models, strict=False):
        for name in ABLATIONS:
            points = [(pool, _last(rows, model, "n64", name, pool)) for pool in (1.0, 0.5, 0.25)]
            known = [(pool, row["tokens_per_second"]) for pool, row in points if row]
            if known:
                axis.plot(*zip(*known, strict=True), marker="o", label=name)
        axis.set_title(f"{model}, 64 adapters: tokens per second")
        axis.set_xlabel("share of the KV that the pool holds, beside 16 adapters")
        axis.set_xticks([0.25, 0.5, 1.0])
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure
