"""The dashboards in the tree are those their generator writes."""

import json
import re
from pathlib import Path

import pytest

from adapter_store.metrics import RedisMetrics, StoreMetrics
from common.call_metrics import CallInterceptor
from common.metrics import LifeMetrics, certificate_gauge, new_registry
from deploy.grafana.dashboards import DASHBOARDS
from deploy.grafana.panels import FOLDER, Dashboard, path_of, to_json
from gateway.metrics import GatewayMetrics
from gpu_worker.metrics import WorkerMetrics
from scheduler.metrics import FairnessDeficit, SchedulerMetrics, active_gauge
from tests.checkout import read


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.name)
def test_the_file_is_what_the_generator_writes(dashboard: Dashboard) -> None:
    assert path_of(dashboard).read_text(encoding="utf-8") == to_json(dashboard)


def test_there_is_no_other_dashboard() -> None:
    assert set(FOLDER.glob("*.json")) == {path_of(dashboard) for dashboard in DASHBOARDS}


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.name)
def test_panels_do_not_overlap(dashboard: Dashboard) -> None:
    places = [panel["gridPos"] for panel in json.loads(to_json(dashboard))["panels"]]
    cells = [(place["x"] + x, place["y"] + y) for place in places for x in range(place["w"]) for y in range(place["h"])]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


def test_no_expression_names_a_machine_or_a_scrape_interval() -> None:
    for dashboard in DASHBOARDS:
        for panel in dashboard.panels:
            for expression in panel.queries.values():
                assert "127.0.0.1" not in expression
                assert "rate(" not in expression or "[$__rate_interval]" in expression


def test_the_folder_is_beside_its_generator() -> None:
    assert Path("deploy/grafana") == FOLDER.relative_to(FOLDER.parents[1])


def names_of_ours() -> set[str]:
    """As they stand in an exposition, without what a scrape adds to a histogram's name."""
    registry = new_registry()
    GatewayMetrics(registry)
    active_gauge(registry)
    SchedulerMetrics(registry, lambda: 0.0)
    FairnessDeficit(registry, "seconds", dict, 1)
    FairnessDeficit(registry, "tokens", dict, 1)
    WorkerMetrics(registry)
    StoreMetrics(registry)
    RedisMetrics(registry)
    LifeMetrics(registry, None)
    certificate_gauge(registry)
    CallInterceptor(registry)
    suffixes = {"counter": "_total", "info": "_info"}
    found = {metric.name + suffixes.get(metric.type, "") for metric in registry.collect()}
    return {name for name in found if not name.startswith(("process_", "python_", "vllm:"))}


def test_every_metric_of_ours_has_a_panel() -> None:
    """The live test finds this out too, minutes later."""
    names = names_of_ours()
    assert len(names) > 50
    expressions = "\n".join(text for board in DASHBOARDS for panel in board.panels for text in panel.queries.values())
    assert [name for name in names if not re.search(rf"\b{name}(_bucket|_sum|_count)?(?![\w:])", expressions)] == []


def test_the_page_of_metrics_lists_all_of_them_and_no_other() -> None:
    assert sorted(re.findall(r"(?m)^\| `([\w:]+)` \|", read("docs/metrics.md"))) == sorted(names_of_ours())
