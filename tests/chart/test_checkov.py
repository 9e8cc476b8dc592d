"""checkov finds nothing in the rendered chart and the Dockerfile but what is excused, with a reason, in one file."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chart.rendering import NAMESPACE, Manifest, render
from tests.chart.value_sets import VALUE_SETS
from tests.checkout import ROOT

pytestmark = pytest.mark.deploy

CHECKOV = ROOT / ".venv-checkov" / "bin" / "checkov"
SKIPS = ROOT / "tests" / "chart" / "checkov_skips.yaml"


def skips(kind: str = "CKV_") -> dict[str, str]:
    """Check -> reason, of the checks whose name begins so."""
    found: dict[str, str] = yaml.safe_load(SKIPS.read_text(encoding="utf-8"))
    return {check: reason for check, reason in found.items() if check.startswith(kind)}


def findings(folder: Path, framework: str) -> list[str]:
    command = [str(CHECKOV), "-d", str(folder), "--framework", framework, "--output", "json", "--quiet", "--compact"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=folder)
    report: Any = json.loads(result.stdout)
    assert report["summary"]["passed"] > 100, result.stderr
    return [
        f"{check['check_id']} {check['check_name']}: {check['resource']}"
        for check in report["results"]["failed_checks"]
    ]


def in_namespace(values: dict[str, Any]) -> list[Manifest]:
    """As Helm installs them: objects that name no namespace go to the release's."""
    manifests = render(values)
    for manifest in manifests:
        manifest["metadata"].setdefault("namespace", NAMESPACE)
    return manifests


@pytest.mark.timeout(300)
def test_checkov_finds_what_is_excused_and_nothing_else(tmp_path: Path) -> None:
    for name, values in VALUE_SETS.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump_all(in_namespace(values)), encoding="utf-8")
    found = findings(tmp_path, "kubernetes")
    assert [finding for finding in found if finding.split()[0] not in skips()] == []
    # A skip that excuses nothing hides something later.
    assert set(skips("CKV_K8S")) == {finding.split()[0] for finding in found}


@pytest.mark.timeout(300)
def test_so_it_does_in_the_dockerfile() -> None:
    found = findings(ROOT / "deploy" / "docker", "dockerfile")
    assert {finding.split()[0] for finding in found} == set(skips("CKV_DOCKER"))


@pytest.mark.timeout(300)
def test_a_dockerfile_that_runs_as_root_is_found(tmp_path: Path) -> None:
    text = (ROOT / "deploy" / "docker" / "Dockerfile").read_text(encoding="utf-8")
    (tmp_path / "Dockerfile").write_text(text.replace("USER 10001:10001", "USER root"), encoding="utf-8")
    assert "CKV_DOCKER_8" in {finding.split()[0] for finding in findings(tmp_path, "dockerfile")}


def test_every_skip_has_a_reason() -> None:
    assert [check for check, reason in skips().items() if len(reason.split()) < 6] == []
