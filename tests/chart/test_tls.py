"""With TLS: who is shown which certificate for which name, and the release as processes of this host."""

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from loraplex import Client, LoraplexError
from loraplex.tls import Tls
from tests.certificates import Authority, Pair, authority
from tests.chart.host import Host
from tests.chart.rendering import Manifest, notes, pod_templates, render
from tests.chart.value_sets import EVERYTHING, MINIMAL, TLS

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(400)]

# The TLS value set without what cannot stand on this host: a Redis and an ingress elsewhere.
HERE = {"tls": TLS["tls"], "gateway": {"tls": TLS["gateway"]["tls"]}}
INSIDE = {"scheduler": 50052, "adapter-store": 50053, "worker-default": 50060}


def certificates(values: dict[str, Any]) -> dict[str, list[str]]:
    """Secret -> names that cert-manager is asked for."""
    found = [manifest["spec"] for manifest in render(values) if manifest["kind"] == "Certificate"]
    return {spec["secretName"]: spec["dnsNames"] for spec in found}


def covers(name: str, host: str) -> bool:
    """As gRPC compares them: a star is one label, and two more must follow."""
    if not name.startswith("*."):
        return name == host
    first, _, rest = host.partition(".")
    return bool(first) and rest == name[2:] and "." in rest


def dialled(manifests: list[Manifest]) -> set[str]:
    """Host names that services are told to dial, or that workers give gateways to dial."""
    found = set()
    for name, pod in pod_templates(manifests).items():
        for container in pod["spec"]["containers"]:
            for variable in container.get("env", []):
                if variable["name"] == "LORAPLEX_ADVERTISE_ADDRESS":
                    found.add(variable["value"].replace("$(LORAPLEX_WORKER_ID)", f"{name}-7").split(":")[0])
    for manifest in manifests:
        if manifest["kind"] == "ConfigMap":
            options = manifest["data"]
            found |= {options[key].split(":")[0] for key in options if re.search("_SCHEDULER$|_STORE$", key)}
    return found


def test_every_name_that_is_dialled_is_in_the_certificate() -> None:
    names = certificates(EVERYTHING)["demo-loraplex-tls"]
    hosts = dialled(render(EVERYTHING))
    assert len(hosts) == 4
    assert [host for host in sorted(hosts) if not any(covers(name, host) for name in names)] == []


def test_without_tls_an_address_of_a_pod_is_dialled() -> None:
    """Which no certificate covers, so that the test above can fail."""
    assert "$(POD_IP)" in dialled(render(MINIMAL))


def test_the_name_that_the_test_pod_dials_is_in_the_gateways_certificate() -> None:
    (argument, *_) = pod_templates(render(EVERYTHING))["demo-loraplex-test"]["spec"]["containers"][0]["args"]
    host = argument.removeprefix("--gateway=").split(":")[0]
    assert {host, "lora.example"} <= set(certificates(EVERYTHING)["demo-loraplex-gateway-tls"])


@pytest.mark.parametrize("values", [TLS, EVERYTHING], ids=["secret", "issuer"])
def test_probes_ask_the_port_that_speaks_no_tls(values: dict[str, Any]) -> None:
    asked = {
        container["name"]: {
            container[f"{probe}Probe"]["grpc"]["port"] for probe in ("startup", "liveness", "readiness")
        }
        for pod in pod_templates(render(values)).values()
        for container in pod["spec"]["containers"]
        if container["name"] not in ("test", "redis")
    }
    assert asked == {"gateway": {9251}, "scheduler": {9252}, "adapter-store": {9253}, "worker": {9260}}


def test_no_pod_but_the_gateways_holds_the_gateways_key() -> None:
    holders = {
        name
        for name, pod in pod_templates(render(TLS)).items()
        for volume in pod["spec"]["volumes"]
        if volume.get("secret", {}).get("secretName") == "gateway-tls" and "items" not in volume["secret"]
    }
    assert holders == {"demo-loraplex-gateway"}


def test_no_port_with_tls_is_said_to_speak_clear_http2() -> None:
    ports = [p for m in render(TLS) if m["kind"] == "Service" for p in m["spec"]["ports"] if p["name"] == "grpc"]
    assert len(ports) == 5
    assert [port for port in ports if "appProtocol" in port] == []
    (ingress,) = [manifest for manifest in render(TLS) if manifest["kind"] == "Ingress"]
    assert ingress["metadata"]["annotations"]["nginx.ingress.kubernetes.io/backend-protocol"] == "GRPCS"


def test_mutual_tls_is_a_switch() -> None:
    def required(mutual: bool) -> set[str]:
        manifests = render({**TLS, "tls": {"secret": "inner-tls", "mutual": mutual}})
        data = [m["data"] for m in manifests if m["kind"] == "ConfigMap"]
        return {options["LORAPLEX_TLS_REQUIRE_CLIENT"] for options in data if "LORAPLEX_TLS_REQUIRE_CLIENT" in options}

    assert (required(True), required(False)) == ({"true"}, {"false"})


def test_the_notes_name_the_names_and_warn_of_what_is_open() -> None:
    text = notes(TLS)
    assert "- demo-loraplex-scheduler\n" in text
    assert '- "*.demo-loraplex-worker-default.prod.svc"' in text
    assert "LORAPLEX_CA=ca.crt" in text
    assert "not encrypted" not in text
    assert "connections between the services are not encrypted" in notes(MINIMAL)
    assert "they take callers without a certificate" in notes({**TLS, "tls": {"secret": "s", "mutual": False}})
    assert "LORAPLEX_CA=system" in notes(EVERYTHING)
    assert "bundled Redis are not encrypted" in notes(EVERYTHING)


@pytest.fixture(scope="module")
def inside(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return authority(tmp_path_factory.mktemp("inside"), "inside")


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return authority(tmp_path_factory.mktemp("outside"), "outside")


def secret(authority: Authority, pair: Pair) -> dict[str, str]:
    return {"tls.crt": pair.cert.read_text(), "tls.key": pair.key.read_text(), "ca.crt": authority.cert.read_text()}


@pytest.fixture(scope="module")
def host(inside: Authority, outside: Authority) -> Iterator[Host]:
    secrets = {
        "inner-tls": secret(inside, inside.issue("inner")),
        "gateway-tls": secret(outside, outside.issue("door")),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        host = Host(render(HERE), folder, secrets)
        try:
            host.start()
            host.await_ready()
            yield host
        finally:
            host.stop()


def test_the_test_pod_passes_with_the_authority_that_is_mounted(host: Host) -> None:
    result = host.run_test()
    assert result.returncode == 0, result.stdout
    assert "'smaerts'" in result.stdout


def test_the_test_pod_fails_without_it(host: Host) -> None:
    result = host.run_test(ca="system")
    assert result.returncode == 1
    assert "failed: TLS_REFUSED: the certificate of" in result.stdout


def health_stub(channel: grpc.Channel) -> Any:
    return health_pb2_grpc.HealthStub(channel)


@pytest.mark.parametrize("service", INSIDE)
def test_no_port_inside_answers_without_a_certificate(host: Host, inside: Authority, service: str) -> None:
    address = f"127.0.0.1:{host.port(f'demo-loraplex-{service}', INSIDE[service])}"
    for tls in (Tls(), Tls(ca=inside.cert)):
        with tls.channel(address) as channel, pytest.raises(grpc.RpcError) as refusal:
            health_stub(channel).Check(health_pb2.HealthCheckRequest(), timeout=60)
        assert refusal.value.code() is grpc.StatusCode.UNAVAILABLE


def test_the_gateway_answers_nobody_without_tls(host: Host) -> None:
    address = f"127.0.0.1:{host.port('demo-loraplex-gateway', 50051)}"
    with Client(address) as client, pytest.raises(LoraplexError, match="TLS_REFUSED"):
        client.models()


def test_a_renewed_secret_is_shown_without_a_restart(host: Host, outside: Authority, tmp_path: Path) -> None:
    """As the kubelet does: a link to a folder of the new files takes the place of the link to that of the old."""
    later = authority(tmp_path, "later")
    files = secret(later, later.issue("door"))
    mounted = host.folder / "demo-loraplex-gateway" / "tls-shown"
    fresh = mounted / "..data_tmp"
    fresh.mkdir()
    for file, text in files.items():
        (fresh / file).write_text(text)
        link = mounted / f"{file}.new"
        link.symlink_to(fresh / file)
        link.replace(mounted / file)
    with Client(f"127.0.0.1:{host.port('demo-loraplex-gateway', 50051)}", ca=later.cert) as client:
        assert client.models()


def test_told_to_stop_every_container_ends_well(host: Host) -> None:
    assert set(host.stop().values()) == {0}
