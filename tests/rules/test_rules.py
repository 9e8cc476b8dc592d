"""Alert and recording rules, through Prometheus's own promtool and Alertmanager's amtool; run by `make test-rules`."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.checkout import ROOT, read
from tests.rules.cases import CASES, Case

RULES = ROOT / "deploy" / "prometheus" / "rules.yaml"
pytestmark = pytest.mark.deploy


def alerts() -> dict[str, dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"] if "alert" in rule}


def run(*command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=RULES.parent)


def unit_test(case: Case, rules: Path, folder: Path) -> "subprocess.CompletedProcess[str]":
    """Asks promtool whether the case's alert fires, and resolves, when it should."""
    rule = alerts()[case.alert]
    expected = {
        "exp_labels": {**rule["labels"], **case.labels},
        "exp_annotations": rule["annotations"],
    }
    document = {
        "rule_files": [str(rules)],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in case.series.items()],
                "alert_rule_test": [
                    {"eval_time": case.fires_at, "alertname": case.alert, "exp_alerts": [expected]},
                    {"eval_time": case.resolved_at, "alertname": case.alert, "exp_alerts": []},
                ],
            }
        ],
    }
    file = folder / "case.yaml"
    file.write_text(yaml.safe_dump(document), encoding="utf-8")
    return run("promtool", "test", "rules", str(file))


def test_promtool_takes_the_rules() -> None:
    result = run("promtool", "check", "rules", str(RULES))
    assert result.returncode == 0, result.stdout + result.stderr


def test_promtool_takes_the_example_configuration() -> None:
    result = run("promtool", "check", "config", "prometheus.example.yaml")
    assert result.returncode == 0, result.stdout + result.stderr


def test_amtool_takes_the_example_configuration() -> None:
    result = run("amtool", "check-config", "alertmanager.example.yaml")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.alert)
def test_the_alert_fires_and_resolves(case: Case, tmp_path: Path) -> None:
    result = unit_test(case, RULES, tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_alert_has_a_case() -> None:
    assert sorted(alerts()) == sorted(case.alert for case in CASES)


def test_a_rule_that_never_fires_fails_its_case(tmp_path: Path) -> None:
    broken = tmp_path / "rules.yaml"
    text = RULES.read_text(encoding="utf-8")
    assert "rate1h > 14.4 * 0.001" in text
    broken.write_text(text.replace("rate1h > 14.4 * 0.001", "rate1h > 2"), encoding="utf-8")
    assert unit_test(CASES[0], broken, tmp_path).returncode != 0


def test_a_rule_that_never_resolves_fails_its_case(tmp_path: Path) -> None:
    broken = tmp_path / "rules.yaml"
    text = RULES.read_text(encoding="utf-8").replace('{state="ready"}) == 0', '{state="ready"}) >= 0')
    broken.write_text(text, encoding="utf-8")
    (case,) = [case for case in CASES if case.alert == "LoraplexNoWorker"]
    assert unit_test(case, broken, tmp_path).returncode != 0


@pytest.mark.parametrize("alert", alerts())
def test_the_alert_leads_to_its_entry_in_the_runbook(alert: str) -> None:
    assert alerts()[alert]["annotations"]["runbook"] == f"docs/runbook.md#{alert.lower()}"
    entry = re.search(rf"(?ms)^## {alert}\n(.+?)(?=^## |\Z)", read("docs/runbook.md"))
    assert entry is not None
    assert len(entry[1].split()) >= 25


def test_the_runbook_has_no_entry_without_an_alert() -> None:
    assert re.findall(r"(?m)^## (Loraplex\w+)", read("docs/runbook.md")) == list(alerts())
