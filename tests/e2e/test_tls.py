"""A fleet whose services know each other by certificates, and whose gateway shows one to everybody."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from loraplex import AsyncClient, Client, LoraplexError
from loraplex.fleet import Fleet, FleetOptions
from loraplex.tls import Tls
from loraplex.v1 import scheduler_pb2, scheduler_pb2_grpc
from tests.certificates import Authority, Pair, authority
from tests.checkout import ROOT
from tests.e2e.support import all_at_once, greedy_tokens
from tests.e2e.tiny_model import TinyModel

INTERNAL = ("adapter_store", "scheduler", "gpu_worker")


@pytest.fixture(scope="module")
def inside(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Of the services among each other."""
    return authority(tmp_path_factory.mktemp("inside"), "inside")


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Of the gateway, for its clients."""
    return authority(tmp_path_factory.mktemp("outside"), "outside")


@pytest.fixture(scope="module")
def shown(outside: Authority, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The files that the gateway shows; tests replace them."""
    return outside.issue("gateway").install(tmp_path_factory.mktemp("shown"))


@pytest.fixture(scope="module")
def tls_fleet(
    tiny: TinyModel, inside: Authority, outside: Authority, shown: Pair, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    extra = {}
    for service in INTERNAL:
        own = inside.issue(service)
        extra[service] = [f"--tls-cert={own.cert}", f"--tls-key={own.key}", f"--tls-ca={inside.cert}"]
        extra[service].append("--tls-require-client")
    own = inside.issue("gateway")
    extra["gateway"] = [f"--tls-cert={shown.cert}", f"--tls-key={shown.key}", f"--tls-ca={inside.cert}"]
    extra["gateway"] += [f"--tls-client-cert={own.cert}", f"--tls-client-key={own.key}"]
    options = FleetOptions(model=tiny.base, data_dir=tmp_path_factory.mktemp("fleet"), memory="32MiB", extra=extra)
    with Fleet(options) as fleet:
        with Client(fleet.gateway.address, ca=outside.cert) as client:
            for name, folder in tiny.adapters.items():
                client.adapters.push(name, folder)
        yield fleet


async def test_every_adapter_is_fetched_and_answers_over_tls(
    tiny: TinyModel, tls_fleet: Fleet, outside: Authority
) -> None:
    async with AsyncClient(tls_fleet.gateway.address, ca=outside.cert) as client:
        assert await all_at_once(client, tiny.prompts) == tiny.answers


@pytest.mark.parametrize("service", ["adapter_store", "scheduler", "worker-0"])
def test_no_service_inside_takes_a_caller_without_a_certificate(
    tls_fleet: Fleet, inside: Authority, service: str
) -> None:
    address = tls_fleet.services[service].address
    for tls in (Tls(), Tls(ca=inside.cert)):
        with tls.channel(address) as channel, pytest.raises(grpc.RpcError) as refusal:
            scheduler_pb2_grpc.SchedulerServiceStub(channel).GetState(scheduler_pb2.GetStateRequest(), timeout=60)
        assert refusal.value.code() is grpc.StatusCode.UNAVAILABLE


def test_the_scheduler_takes_a_caller_with_one(tls_fleet: Fleet, inside: Authority) -> None:
    """So that the refusals above are about the certificate."""
    operator = inside.issue("operator")
    tls = Tls(ca=inside.cert, cert=operator.cert, key=operator.key)
    with tls.channel(tls_fleet.scheduler.address) as channel:
        stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)
        state = stub.GetState(scheduler_pb2.GetStateRequest(), timeout=60)
    assert len(state.workers) == 1


def test_the_gateway_takes_nobody_without_tls(tls_fleet: Fleet) -> None:
    with Client(tls_fleet.gateway.address) as client, pytest.raises(LoraplexError, match="TLS_REFUSED"):
        client.models()


async def test_a_stream_and_new_callers_live_through_a_new_certificate(
    tiny: TinyModel, tls_fleet: Fleet, outside: Authority, shown: Pair, tmp_path: Path
) -> None:
    """The new one is of another authority, so that who trusts it alone was shown it."""
    other = authority(tmp_path, "next")
    prompt = tiny.prompts["rank-8"]
    async with AsyncClient(tls_fleet.gateway.address, ca=outside.cert) as client:
        stream = client.stream(prompt, "rank-8", temperature=0.0, max_tokens=200, ignore_eos=True)
        await anext(stream)
        other.issue("gateway").install(shown.cert.parent)
        async with AsyncClient(tls_fleet.gateway.address, ca=other.cert) as newcomer:
            assert await greedy_tokens(newcomer, "rank-8", prompt) == tiny.answers["rank-8"]
        async for delta in stream:
            finish = delta.finish_reason
        assert finish == "length"
        assert await greedy_tokens(client, "rank-8", prompt) == tiny.answers["rank-8"]
    outside.issue("gateway").install(shown.cert.parent)


SERVICES = {
    "gateway": ["--scheduler=127.0.0.1:1", "--adapter-store=127.0.0.1:1"],
    "scheduler": ["--port=0", "--metrics-port=0"],
    "adapter_store": ["--data-dir=data"],
    "gpu_worker": ["--model=model", "--scheduler=127.0.0.1:1", "--adapter-store=127.0.0.1:1"],
}


@pytest.mark.parametrize("service", SERVICES)
def test_a_key_that_does_not_fit_ends_the_start_with_one_line(service: str, inside: Authority, tmp_path: Path) -> None:
    cert, key = inside.issue("one").cert, inside.issue("two").key
    files = [f"--tls-cert={cert}", f"--tls-key={key}"]
    command = [sys.executable, "-m", service, *SERVICES[service], *files]
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert f"cannot start: the key in {key} does not belong to the certificate in {cert}" in json.loads(line)["message"]


def test_a_missing_authority_ends_the_start_with_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gateway", *SERVICES["gateway"], f"--tls-ca={tmp_path / 'none'}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert f"cannot start: {tmp_path / 'none'} cannot be read: No such file" in json.loads(line)["message"]
