"""What the chart renders is what Kubernetes takes, and what its restricted pod security allows."""

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import helm_python
import jsonschema
import kubernetes_validate
import pytest

from adapter_store.config import StoreConfig
from common.config import ServiceConfig
from gateway.config import GatewayConfig
from gpu_worker.config import WorkerConfig
from scheduler.config import SchedulerConfig
from tests.chart.rendering import CHART, Manifest, notes, pod_templates, render
from tests.chart.value_sets import EVERYTHING, GPU, HA, MINIMAL, TLS, VALUE_SETS
from tests.checkout import read

pytestmark = pytest.mark.deploy

# The oldest that the chart installs on, and the newest that there are schemas for.
KUBERNETES = ("1.30", "1.37")
SCHEMAS = Path(__file__).resolve().parent / "schemas"
CONFIGS: dict[str, type[ServiceConfig]] = {
    "gateway": GatewayConfig,
    "scheduler": SchedulerConfig,
    "adapter-store": StoreConfig,
    "worker": WorkerConfig,
}


def check(manifest: Manifest, version: str) -> None:
    """Raises for anything that this Kubernetes, or the owner of a custom kind, would refuse; for unknown kinds too."""
    own = SCHEMAS / f"{manifest['kind']}.json"
    if own.is_file():
        jsonschema.validate(manifest, json.loads(own.read_text(encoding="utf-8")))
        return
    kubernetes_validate.validate(manifest, version, strict=True)


def containers(values: dict[str, Any]) -> list[tuple[str, Manifest, Manifest]]:
    """(workload, pod spec, container) of everything that runs."""
    return [
        (name, pod["spec"], container)
        for name, pod in pod_templates(render(values)).items()
        for container in [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]
    ]


@pytest.mark.parametrize("values", VALUE_SETS.values(), ids=VALUE_SETS)
def test_helm_finds_nothing_to_say(values: dict[str, Any]) -> None:
    for version in KUBERNETES:
        report = helm_python.lint(CHART, values, strict=True, kube_version=f"v{version}.0")
        assert report["errors"] == []
        assert [message for message in report["messages"] if message["severity"] > 1] == []


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("values", VALUE_SETS.values(), ids=VALUE_SETS)
def test_kubernetes_takes_every_object(values: dict[str, Any], version: str) -> None:
    manifests = render(values)
    assert len(manifests) > 15
    for manifest in manifests:
        check(manifest, version)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(kubernetes_validate.SchemaNotFoundError):
        check({"apiVersion": "example.com/v1", "kind": "Made", "metadata": {"name": "up"}}, KUBERNETES[0])


@pytest.mark.parametrize("kind", sorted(path.stem for path in SCHEMAS.glob("*.json")))
def test_a_custom_kind_with_an_unknown_field_is_refused(kind: str) -> None:
    values = {
        **EVERYTHING,
        "metrics": {**EVERYTHING["metrics"], "monitor": "pod" if kind == "PodMonitor" else "service"},
    }
    (manifest, *_) = [manifest for manifest in render(values) if manifest["kind"] == kind]
    check(manifest, KUBERNETES[0])
    manifest["spec"]["madeUp"] = True
    with pytest.raises(jsonschema.ValidationError):
        check(manifest, KUBERNETES[0])


@pytest.mark.parametrize("values", VALUE_SETS.values(), ids=VALUE_SETS)
def test_every_container_is_restricted(values: dict[str, Any]) -> None:
    for name, pod, container in containers(values):
        security = container["securityContext"]
        assert security["allowPrivilegeEscalation"] is False, name
        assert security["readOnlyRootFilesystem"] is True, name
        assert security["capabilities"] == {"drop": ["ALL"]}, name
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["automountServiceAccountToken"] is False, name
        assert pod["enableServiceLinks"] is False, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys(), name
        assert {"requests", "limits"} <= container["resources"].keys(), name
        volumes = {next(key for key in volume if key != "name") for volume in pod["volumes"]}
        assert volumes <= {"emptyDir", "configMap", "secret", "persistentVolumeClaim"}, name


@pytest.mark.parametrize("values", VALUE_SETS.values(), ids=VALUE_SETS)
def test_every_option_that_is_set_exists(values: dict[str, Any]) -> None:
    """A name that no service reads would be ignored without a word."""
    for manifest in render(values):
        names = [name for name in manifest.get("data", {}) if name.startswith("LORAPLEX_")]
        if manifest["kind"] == "ConfigMap" and names:
            config = CONFIGS[manifest["metadata"]["labels"]["app.kubernetes.io/component"]]
            known = {f"LORAPLEX_{spec.name.upper()}" for spec in fields(config)}
            assert set(names) <= known


@pytest.mark.parametrize("values", VALUE_SETS.values(), ids=VALUE_SETS)
def test_no_password_is_in_a_config_map_an_argument_or_the_environment(values: dict[str, Any]) -> None:
    manifests = render(values)
    secrets = [m["stringData"]["password"] for m in manifests if m["kind"] == "Secret"]
    rest = json.dumps([m for m in manifests if m["kind"] != "Secret"])
    assert len(secrets) == (1 if values in (HA, EVERYTHING) else 0)
    assert [secret for secret in secrets if secret in rest] == []


def test_probes_ask_by_service_name() -> None:
    for name, _, container in containers(MINIMAL):
        if not name.endswith("-test"):
            asked = {probe: container[probe]["grpc"]["service"] for probe in ("livenessProbe", "readinessProbe")}
            assert asked == {"livenessProbe": "liveness", "readinessProbe": "readiness"}


def test_a_changed_option_changes_the_pods_and_only_those() -> None:
    def checksums(values: dict[str, Any]) -> dict[str, str]:
        pods = pod_templates(render(values))
        return {n: p["metadata"]["annotations"].get("checksum/config", "") for n, p in pods.items()}

    before = checksums(MINIMAL)
    after = checksums({"gateway": {"options": {"LORAPLEX_MAX_INFLIGHT_REQUESTS": "1"}}})
    assert [name for name in before if before[name] != after[name]] == ["demo-loraplex-gateway"]


def test_what_is_scaled_has_no_replicas_of_its_own() -> None:
    scaled = {
        manifest["metadata"]["name"]: "replicas" in manifest["spec"]
        for manifest in render(EVERYTHING)
        if manifest["kind"] in ("Deployment", "StatefulSet")
    }
    assert (scaled["demo-loraplex-gateway"], scaled["demo-loraplex-worker-scaled"]) == (False, False)
    assert scaled["demo-loraplex-worker-plain"] is True


def test_every_label_of_a_selector_is_there_and_none_changes() -> None:
    """A selector cannot be changed in an upgrade: nothing of a version may stand in it."""
    manifests = render(EVERYTHING)
    pods = [pod["metadata"]["labels"] for pod in pod_templates(manifests).values()]
    for manifest in manifests:
        selector = manifest.get("spec", {}).get("selector", {})
        if manifest["kind"] in ("Deployment", "StatefulSet"):
            labels = manifest["spec"]["template"]["metadata"]["labels"]
            assert selector["matchLabels"].items() <= labels.items()
            assert {key.split("/")[1] for key in selector["matchLabels"]} <= {"name", "instance", "component", "pool"}
        if manifest["kind"] == "Service":
            assert sum(selector.items() <= labels.items() for labels in pods) == 1


def test_the_triggers_of_keda_ask_for_metrics_that_exist() -> None:
    (scaled,) = [manifest for manifest in render(EVERYTHING) if manifest["kind"] == "ScaledObject"]
    queries = [trigger["metadata"]["query"] for trigger in scaled["spec"]["triggers"]]
    asked = [name for query in queries for name in re.findall(r"loraplex_\w+", query)]
    assert len(asked) == 2
    assert [name for name in asked if f"| `{name}` |" not in read("docs/metrics.md")] == []


def test_the_stores_claim_outlives_the_release() -> None:
    (claim,) = [manifest for manifest in render(MINIMAL) if manifest["kind"] == "PersistentVolumeClaim"]
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"


def test_a_gpu_pool_asks_for_its_gpus_and_mounts_its_model_read_only() -> None:
    ((_, pod, worker),) = [entry for entry in containers(GPU) if "-worker-" in entry[0]]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert {"name": "model", "mountPath": "/model", "readOnly": True} in worker["volumeMounts"]
    assert pod["runtimeClassName"] == "nvidia"


def test_the_notes_have_a_call_and_warn_of_an_open_door() -> None:
    assert "service/demo-loraplex-gateway 50051:50051" in notes(MINIMAL)
    assert "not behind TLS" in notes(MINIMAL)
    assert "not behind TLS" not in notes(TLS)
