"""Every panel and every alert, asked of a real Prometheus that scrapes a real fleet; run by `make test-dashboards`."""

import math
import os
import re
from pathlib import Path

import promql_parser
import pytest
import yaml

from deploy.grafana.dashboards import DASHBOARDS
from deploy.grafana.panels import Dashboard, Panel
from tests.checkout import ROOT
from tests.dashboards.conftest import Scene
from tests.dashboards.pictures import draw
from tests.dashboards.prometheus import RULES

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(400)]

PANELS = [(dashboard, panel) for dashboard in DASHBOARDS for panel in dashboard.panels]
# Metrics that no panel shows, and why not.
EXCEPTIONS = {
    "process_*": "of the process library; memory and cores in use have panels",
    "python_*": "of the interpreter's library",
}


def expressions() -> list[str]:
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    return [rule["expr"] for group in groups for rule in group["rules"]]


def id_of(value: object) -> str:
    return value.name if isinstance(value, Dashboard) else value.title if isinstance(value, Panel) else str(value)


@pytest.mark.parametrize(("dashboard", "panel"), PANELS, ids=id_of)
def test_the_panel_shows_data(scene: Scene, dashboard: Dashboard, panel: Panel) -> None:
    for expression in panel.queries.values():
        promql_parser.parse(expression.replace("$__rate_interval", "1m"))
        shown = scene.prometheus.range(expression, scene.start, scene.end)
        values = [value for _, points in shown for _, value in points if not math.isnan(value)]
        assert values, expression


@pytest.mark.parametrize("expression", expressions())
def test_the_rule_asks_for_series_that_exist(scene: Scene, expression: str) -> None:
    promql_parser.parse(expression)
    scene.prometheus.instant(expression)
    for name in re.findall(r"\bloraplex[\w:]*", re.sub(r"\{[^}]*\}", "", expression)):
        assert scene.prometheus.instant(f"count({name})"), name


def test_a_metric_that_does_not_exist_has_no_data(scene: Scene) -> None:
    assert scene.prometheus.instant("count(loraplex_gateway_made_up_total)") == []


def test_every_metric_is_on_a_panel(scene: Scene) -> None:
    exposed = scene.prometheus.ask("metadata")
    assert len(exposed) > 50
    shown = "\n".join(expression for _, panel in PANELS for expression in panel.queries.values())
    patterns = [re.compile(name.replace("*", ".*")) for name in EXCEPTIONS]
    missing = [
        name
        for name in exposed
        if not re.search(rf"\b{name}(_bucket|_sum|_count|_total|_info)?(?![\w:])", shown)
        and not any(pattern.fullmatch(name) for pattern in patterns)
    ]
    assert missing == []


def test_nothing_alarms_while_all_is_well(scene: Scene) -> None:
    firing = [alert["labels"]["alertname"] for alert in scene.prometheus.ask("alerts")["alerts"]]
    assert not set(firing) & {"LoraplexNoWorker", "LoraplexTokenGap", "LoraplexAdapterDamaged", "LoraplexRedisDown"}


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=id_of)
def test_the_dashboard_can_be_drawn(scene: Scene, dashboard: Dashboard, tmp_path: Path) -> None:
    """With KEEP_PICTURES set the pictures replace those of the documentation."""
    folder = ROOT / "docs" / "images" if os.environ.get("KEEP_PICTURES") else tmp_path
    picture = folder / f"dashboard-{dashboard.name}.png"
    draw(dashboard, scene, picture)
    assert 10_000 < picture.stat().st_size < 250_000
