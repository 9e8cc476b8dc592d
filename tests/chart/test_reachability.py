"""Who reaches whom through the network policies, computed from what is rendered, is the call table and nothing more."""

from typing import Any

import pytest

from tests.chart.rendering import Manifest, pod_templates, render
from tests.chart.value_sets import EVERYTHING, HA, MINIMAL
from tests.checkout import read

pytestmark = pytest.mark.deploy

PORTS = {"gateway": 50051, "scheduler": 50052, "adapter-store": 50053, "worker": 50060, "redis": 6379}
METRICS = {"gateway": 9151, "scheduler": 9152, "adapter-store": 9153, "worker": 9160}
# The table of docs/operations.md: caller -> called.
CALLS = {
    ("gateway", "scheduler"),
    ("gateway", "worker"),
    ("gateway", "adapter-store"),
    ("gateway", "redis"),
    ("worker", "scheduler"),
    ("worker", "adapter-store"),
    ("adapter-store", "redis"),
    ("scheduler", "redis"),
    ("test", "gateway"),
}
_NAMES = {
    "workers": "worker",
    "adapter store": "adapter-store",
    "redis (for quotas)": "redis",
    "the `helm test` pod": "test",
}


def documented() -> set[tuple[str, str]]:
    """The rows of docs/operations.md about pods of the release."""
    table = read("docs/operations.md").split("| from | to |\n|---|---|\n")[1].split("\n\n")[0]
    rows = [line.strip("| ").lower().split(" | ") for line in table.splitlines()]
    calls = {
        (_NAMES.get(caller, caller), _NAMES.get(called, called))
        for row in rows
        for caller in [row[0].split(",")[0]]
        for called in row[1].split(", ")
    }
    return {(caller, called) for caller, called in calls if caller in {*PORTS, "test"}}


# Somebody in another namespace: a client of the gateway, a Prometheus, or anybody else.
STRANGER: dict[str, str] = {}


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    assert set(selector) <= {"matchLabels"}
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


def peer_allowed(peers: list[dict[str, Any]] | None, labels: dict[str, str], namespace: dict[str, str] | None) -> bool:
    """`namespace` holds the labels of another namespace; None is the release's own."""
    if not peers:
        return True
    for peer in peers:
        if "ipBlock" in peer:
            continue
        inside = (
            namespace is None
            if "namespaceSelector" not in peer
            else selects(peer["namespaceSelector"], namespace or {})
        )
        if inside and selects(peer.get("podSelector", {}), labels):
            return True
    return False


def allowed(
    policies: list[Manifest],
    direction: str,
    subject: dict[str, str],
    peer: dict[str, str],
    port: int,
    namespace: dict[str, str] | None = None,
) -> bool:
    """As Kubernetes says: without a policy everything, else what any of them allows."""
    kind, side = ("Ingress", "from") if direction == "in" else ("Egress", "to")
    mine = [
        p["spec"] for p in policies if selects(p["spec"]["podSelector"], subject) and kind in p["spec"]["policyTypes"]
    ]
    if not mine:
        return True
    rules = [rule for spec in mine for rule in spec.get(kind.lower()) or []]
    return any(
        peer_allowed(rule.get(side), peer, namespace)
        and any(p["port"] == port for p in rule.get("ports", [{"port": port}]))
        for rule in rules
    )


class Cluster:
    """The pods of a release and its policies."""

    def __init__(self, values: dict[str, Any]) -> None:
        manifests = render(values)
        self.policies = [m for m in manifests if m["kind"] == "NetworkPolicy"]
        pods = [pod["metadata"]["labels"] for pod in pod_templates(manifests).values()]
        self.pods = {labels["app.kubernetes.io/component"]: labels for labels in pods}

    def reaches(self, caller: str, called: str, port: int) -> bool:
        a, b = self.pods[caller], self.pods[called]
        return allowed(self.policies, "out", a, b, port) and allowed(self.policies, "in", b, a, port)

    def matrix(self) -> set[tuple[str, str]]:
        ports = [*PORTS.values()]
        return {(a, b) for a in self.pods for b in self.pods if any(self.reaches(a, b, port) for port in ports)}


def test_the_table_is_the_documented_one() -> None:
    assert documented() == CALLS


@pytest.mark.parametrize("values", [HA, EVERYTHING], ids=["ha", "everything"])
def test_services_reach_each_other_as_the_table_says(values: dict[str, Any]) -> None:
    cluster = Cluster(values)
    assert cluster.matrix() == CALLS


@pytest.mark.parametrize("caller", PORTS)
def test_only_on_the_port_of_the_service(caller: str) -> None:
    cluster = Cluster(HA)
    for called in PORTS:
        for port in {*PORTS.values(), *METRICS.values(), 22, 8000} - {PORTS[called], METRICS.get(called)}:
            assert not cluster.reaches(caller, called, port)


def test_a_scheduler_without_a_standby_reaches_nobody() -> None:
    alone = Cluster({**HA, "scheduler": {"replicas": 1}})
    assert alone.matrix() == CALLS - {("scheduler", "redis")}


def test_without_redis_nobody_may_reach_one() -> None:
    assert Cluster(MINIMAL).matrix() == {pair for pair in CALLS if "redis" not in pair}


@pytest.mark.parametrize("component", PORTS)
def test_a_stranger_reaches_the_gateway_and_figures_alone(component: str) -> None:
    cluster = Cluster(HA)
    ports = [*PORTS.values(), *METRICS.values()]
    seen = {p for p in ports if allowed(cluster.policies, "in", cluster.pods[component], STRANGER, p, namespace={})}
    assert seen == {METRICS.get(component, 0), *([PORTS["gateway"]] if component == "gateway" else [])} - {0}


def test_with_named_clients_a_stranger_reaches_nothing() -> None:
    cluster = Cluster(EVERYTHING)
    for component in PORTS:
        for port in [*PORTS.values(), *METRICS.values()]:
            assert not allowed(cluster.policies, "in", cluster.pods[component], STRANGER, port, namespace={})
    scraper = {"name": "monitoring"}
    assert allowed(cluster.policies, "in", cluster.pods["worker"], STRANGER, METRICS["worker"], namespace=scraper)


def test_without_policies_everybody_reaches_everybody() -> None:
    """The matrix is computed, not assumed."""
    cluster = Cluster({**HA, "networkPolicy": {"enabled": False}})
    assert len(cluster.matrix()) == len(cluster.pods) ** 2


def test_names_are_resolved_by_those_who_call() -> None:
    dns = {"k8s-app": "kube-dns"}
    cluster = Cluster(HA)
    resolves = {
        c for c, labels in cluster.pods.items() if allowed(cluster.policies, "out", labels, dns, 53, namespace={})
    }
    assert resolves == {"gateway", "scheduler", "worker", "adapter-store", "test"}
