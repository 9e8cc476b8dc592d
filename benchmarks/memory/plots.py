"""The plots of a run, as SVG; matplotlib is wanted here and nowhere else."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot  # the backend comes first

Row = dict[str, Any]


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """One file for each part that has rows."""
    makers = {"wait": _wait, "shares": _shares, "eviction": _eviction}
    drawn = []
    for part, make in makers.items():
        own = [row for row in rows if row["part"] == part]
        if own:
            figure = make(own)
            drawn.append(folder / f"memory-{part}.svg")
            figure.savefig(drawn[-1], metadata={"Date": None})
            pyplot.close(figure)
    return drawn


def _wait(rows: Sequence[Row]) -> Any:
    rows = [row for row in rows if row["popularity"] == "uniform"]
    ratios = sorted({row["load_to_step_ratio"] for row in rows})
    figure, axes = pyplot.subplots(1, len(ratios), figsize=(5 * len(ratios), 3.6), squeeze=False)
    for axis, ratio in zip(axes[0], ratios, strict=True):
        for system in dict.fromkeys(row["system"] for row in rows):
            own = [row for row in rows if (row["system"], row["load_to_step_ratio"]) == (system, ratio)]
            line = axis.plot(
                [row["multiple"] for row in own], [row["ttft_p50_ms"] for row in own], marker="o", label=system
            )
            colour = line[0].get_color()
            axis.plot(
                [row["multiple"] for row in own], [row["ttft_p99_ms"] for row in own], linestyle=":", color=colour
            )
        axis.set(title=f"a load takes {ratio:g} decode steps", xlabel="adapters in play / adapters that fit")
        axis.set(xscale="log", yscale="log", ylabel="ms to the first token: p50, p99 dotted")
        axis.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
        axis.legend(fontsize=8)
    figure.tight_layout()
    return figure


def _shares(rows: Sequence[Row]) -> Any:
    figure, axis = pyplot.subplots(figsize=(8, 3.2))
    kinds = ("kv", "prefix", "adapters", "free")
    colours = ("#4f7fc4", "#9dbde6", "#d98a3d", "#e8eaee")
    steps = [row["step"] for row in rows]
    axis.stackplot(steps, *[[row[kind] for row in rows] for kind in kinds], labels=kinds, colors=colours)
    axis.set(
        xlabel="step; 1, then 200, then 1 adapter in play", ylabel="share of the pool", ylim=(0, 1), xlim=(0, steps[-1])
    )
    axis.legend(loc="center right", fontsize=8)
    figure.tight_layout()
    return figure


def _eviction(rows: Sequence[Row]) -> Any:
    figure, axis = pyplot.subplots(figsize=(8, 3.2))
    cases = list(dict.fromkeys((row["requests"], row["trace"]) for row in rows))
    fewer = [
        sum(row["fewer"] for row in rows if (row["requests"], row["trace"]) == case)
        / sum((row["requests"], row["trace"]) == case for row in rows)
        for case in cases
    ]
    axis.bar([f"{requests}\n{trace}" for requests, trace in cases], [100 * share for share in fewer], color="#4f7fc4")
    axis.set(ylabel="% fewer miss-seconds than LRU")
    axis.tick_params(axis="x", labelsize=7, rotation=30)
    figure.tight_layout()
    return figure
