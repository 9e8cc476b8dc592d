"""With TLS: who is shown which certificate for which name, and the release as processes of this host."""

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common.roles import GATEWAY, OPERATOR, ROLE_URI, WORKER
from loraplex import Client, LoraplexError
from loraplex.tls import Tls
from loraplex.v1 import adapter_store_pb2, adapter_store_pb2_grpc, memory_pb2, memory_pb2_grpc
from tests.certificates import LOOPBACK, Authority, Pair, authority
from tests.chart.host import Host
from tests.chart.rendering import Manifest, notes, pod_templates, render
from tests.chart.value_sets import EVERYTHING, MINIMAL, TLS

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(400)]

# The TLS value set without what cannot stand on this host: a Redis and an ingress elsewhere.
HERE = {"tls": {**TLS["tls"], "roles": True}, "gateway": {"tls": TLS["gateway"]["tls"]}}
# Component -> its role.
COMPONENTS = {"gateway": GATEWAY, "worker": WORKER, "scheduler": "", "adapter-store": ""}
INSIDE = {"scheduler": 50052, "adapter-store": 50053, "worker-default": 50060}


def certificates(values: dict[str, Any]) -> dict[str, Manifest]:
    """Secret -> what cert-manager is asked for."""
    found = [manifest["spec"] for manifest in render(values) if manifest["kind"] == "Certificate"]
    return {spec["secretName"]: spec for spec in found}


def names_in(values: dict[str, Any], secret: str) -> list[str]:
    names: list[str] = certificates(values)[secret].get("dnsNames", [])
    return names


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


@pytest.mark.parametrize("roles", [False, True])
def test_every_name_that_is_dialled_is_in_the_certificate(roles: bool) -> None:
    values = {**EVERYTHING, "tls": {**EVERYTHING["tls"], "roles": roles}}
    hosts = dialled(render(values))
    assert len(hosts) == 4
    for host in hosts:
        (service,) = [service for service in ("scheduler", "adapter-store", "worker") if service in host]
        names = names_in(values, f"demo-loraplex-tls-{service}" if roles else "demo-loraplex-tls")
        assert any(covers(name, host) for name in names), host


def test_each_service_has_a_key_and_a_role_of_its_own() -> None:
    roles = {secret: spec["uris"] for secret, spec in certificates(EVERYTHING).items() if "uris" in spec}
    assert roles == {f"demo-loraplex-tls-{role}": [f"{ROLE_URI}{role}"] for role in ("gateway", "worker")}
    mounted = {
        name: [volume["secret"]["secretName"] for volume in pod["spec"]["volumes"] if volume["name"] == "tls"]
        for name, pod in pod_templates(render(EVERYTHING)).items()
    }
    assert {name.split("-")[2]: secrets for name, secrets in mounted.items() if secrets} == {
        "gateway": ["demo-loraplex-tls-gateway"],
        "scheduler": ["demo-loraplex-tls-scheduler"],
        "adapter": ["demo-loraplex-tls-adapter-store"],
        "worker": ["demo-loraplex-tls-worker"],
    }


def test_who_takes_callers_asks_them_for_a_role_and_the_gateway_does_not() -> None:
    data = {m["metadata"]["name"]: m["data"] for m in render(EVERYTHING) if m["kind"] == "ConfigMap"}
    asking = {name.removeprefix("demo-loraplex-") for name in data if data[name].get("LORAPLEX_TLS_ROLES") == "true"}
    assert asking == {"scheduler", "adapter-store", "worker-scaled", "worker-plain"}


def test_without_tls_an_address_of_a_pod_is_dialled() -> None:
    """Which no certificate covers, so that the test above can fail."""
    assert "$(POD_IP)" in dialled(render(MINIMAL))


def test_the_name_that_the_test_pod_dials_is_in_the_gateways_certificate() -> None:
    (argument, *_) = pod_templates(render(EVERYTHING))["demo-loraplex-test"]["spec"]["containers"][0]["args"]
    host = argument.removeprefix("--gateway=").split(":")[0]
    assert {host, "lora.example"} <= set(names_in(EVERYTHING, "demo-loraplex-gateway-tls"))


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
    assert "demo-loraplex-tls-gateway:\n- URI loraplex://role/gateway\n" in notes(EVERYTHING)
    assert 'demo-loraplex-tls-worker:\n- "*.demo-loraplex-worker-scaled.prod.svc"\n' in notes(EVERYTHING)
    assert "demo-loraplex-tls-scheduler:\n- demo-loraplex-scheduler\ndemo-loraplex-tls-adapter-store:\n" in notes(
        EVERYTHING
    )
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
    secrets = {"gateway-tls": secret(outside, outside.issue("door"))}
    for component, role in COMPONENTS.items():
        names = f"{LOOPBACK},URI:{ROLE_URI}{role}" if role else LOOPBACK
        secrets[f"inner-tls-{component}"] = secret(inside, inside.issue(component, names))
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


def address_of(host: Host, service: str) -> str:
    return f"127.0.0.1:{host.port(f'demo-loraplex-{service}', INSIDE[service])}"


def health_stub(channel: grpc.Channel) -> Any:
    return health_pb2_grpc.HealthStub(channel)


@pytest.mark.parametrize("service", INSIDE)
def test_no_port_inside_answers_without_a_certificate(host: Host, inside: Authority, service: str) -> None:
    address = address_of(host, service)
    for tls in (Tls(), Tls(ca=inside.cert)):
        with tls.channel(address) as channel, pytest.raises(grpc.RpcError) as refusal:
            health_stub(channel).Check(health_pb2.HealthCheckRequest(), timeout=60)
        assert refusal.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("role", [GATEWAY, WORKER, OPERATOR])
def test_the_memory_of_a_worker_is_shown_to_operators_alone(host: Host, inside: Authority, role: str) -> None:
    shown = inside.issue(f"{role}-who-asks", f"{LOOPBACK},URI:{ROLE_URI}{role}")
    with Tls(ca=inside.cert, cert=shown.cert, key=shown.key).channel(address_of(host, "worker-default")) as channel:
        stub = memory_pb2_grpc.MemoryServiceStub(channel)
        if role == OPERATOR:
            assert stub.GetUsage(memory_pb2.GetUsageRequest(), timeout=60).memory.total_pages > 0
            return
        with pytest.raises(grpc.RpcError) as refusal:
            stub.GetUsage(memory_pb2.GetUsageRequest(), timeout=60)
    assert refusal.value.code() is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize(("component", "code"), [("gateway", "NOT_FOUND"), ("worker", "PERMISSION_DENIED")])
def test_a_worker_may_not_delete_what_a_gateway_may(host: Host, inside: Authority, component: str, code: str) -> None:
    """With the very certificates that these services have."""
    pair = Pair(inside.folder / f"{component}.crt", inside.folder / f"{component}.key")
    with Tls(ca=inside.cert, cert=pair.cert, key=pair.key).channel(address_of(host, "adapter-store")) as channel:
        stub = adapter_store_pb2_grpc.AdapterStoreServiceStub(channel)
        with pytest.raises(grpc.RpcError) as refusal:
            stub.DeleteAdapter(adapter_store_pb2.DeleteAdapterRequest(tenant="default", adapter_id="x"), timeout=60)
    assert refusal.value.code().name == code


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
