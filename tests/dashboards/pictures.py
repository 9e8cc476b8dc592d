"""Draws a dashboard's panels with the data that a Prometheus has for them."""

import math
import re
from pathlib import Path
from typing import Any

import matplotlib

from deploy.grafana.panels import Dashboard, Panel
from tests.dashboards.conftest import Scene

matplotlib.use("Agg")
from matplotlib import pyplot

_COLUMNS = 3
_MAX_LINES = 6


def draw(dashboard: Dashboard, scene: Scene, picture: Path) -> None:
    """Writes a PNG."""
    rows = math.ceil(len(dashboard.panels) / _COLUMNS)
    figure, axes = pyplot.subplots(rows, _COLUMNS, figsize=(12, 2.3 * rows), layout="constrained", squeeze=False)
    for axis, panel in zip(axes.flat, dashboard.panels, strict=False):
        _draw_panel(axis, panel, scene)
    for axis in list(axes.flat)[len(dashboard.panels) :]:
        axis.axis("off")
    figure.suptitle(dashboard.title)
    figure.savefig(picture, dpi=70)
    pyplot.close(figure)


def _draw_panel(axis: Any, panel: Panel, scene: Scene) -> None:
    for legend, expression in panel.queries.items():
        shown = scene.prometheus.range(expression, scene.start, scene.end)
        for labels, points in shown[:_MAX_LINES]:
            text = " ".join(labels.get(name, "") for name in re.findall(r"\{\{(\w+)\}\}", legend)) or legend
            times = [at - scene.start for at, _ in points]
            axis.plot(times, [value for _, value in points], label=text, linewidth=1)
    axis.set_title(f"{panel.title} [{panel.unit}]", fontsize=8)
    axis.tick_params(labelsize=6)
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=5, loc="upper left")
