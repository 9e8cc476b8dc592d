"""The chart through real Helm: linted, rendered, and refused."""

from typing import Any

import helm_python
import yaml

from tests.checkout import ROOT

CHART = ROOT / "deploy" / "k8s" / "loraplex"
RELEASE, NAMESPACE = "demo", "prod"
Manifest = dict[str, Any]


def render(values: dict[str, Any]) -> list[Manifest]:
    """Every object of a release. Raises HelmError where the schema or a template refuses the values."""
    return [document for text in render_files(values).values() for document in yaml.safe_load_all(text) if document]


def render_files(values: dict[str, Any]) -> dict[str, str]:
    """Template -> its text, without NOTES.txt."""
    return {name: text for name, text in _render(values).items() if not name.endswith(".txt")}


def notes(values: dict[str, Any]) -> str:
    (text,) = [text for name, text in _render(values).items() if name.endswith("NOTES.txt")]
    return text


def _render(values: dict[str, Any]) -> dict[str, str]:
    with helm_python.Chart.load(CHART) as chart:
        # Rendering alone does not look at the schema, an installation does.
        chart.validate_schema(values)
        rendered: dict[str, str] = chart.render(values, name=RELEASE, namespace=NAMESPACE)
    return rendered


def pod_templates(manifests: list[Manifest]) -> dict[str, Manifest]:
    """Component -> the pod (labels and spec) of its workload, and of the test; pools by their own name."""
    pods = {}
    for manifest in manifests:
        pod = manifest if manifest["kind"] == "Pod" else manifest.get("spec", {}).get("template")
        if isinstance(pod, dict) and "spec" in pod:
            pods[manifest["metadata"]["name"]] = pod
    return pods
