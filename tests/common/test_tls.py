"""TLS of a server and of the channels to it: who is let in, who hears why not, and certificates that are replaced."""

import asyncio
import os
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common.channel import connect
from common.config import ServiceConfig
from common.server import Server
from common.tls import PemFiles, RenewedPem
from tests.certificates import Authority, Pair, authority

TIMEOUT_SECONDS = 60


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return authority(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def pair(ours: Authority) -> Pair:
    return ours.issue("service")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return authority(tmp_path_factory.mktemp("stranger"), "stranger")


@asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[Server]:
    server = Server(ServiceConfig(drain_seconds=0, **options))
    await server.start([])
    try:
        yield server
    finally:
        await server.stop()


@pytest.fixture
async def server(pair: Pair) -> AsyncIterator[Server]:
    """Shows a certificate and asks for none."""
    async with serving(tls_cert=pair.cert, tls_key=pair.key) as server:
        yield server


@pytest.fixture
async def mutual(ours: Authority, pair: Pair) -> AsyncIterator[Server]:
    options = {"tls_ca": ours.cert, "tls_require_client": True}
    async with serving(tls_cert=pair.cert, tls_key=pair.key, **options) as server:
        yield server


async def ask(address: str, tls: PemFiles | None) -> str:
    """`SERVING`, or what the caller hears instead."""
    async with connect(address, tls=tls) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="liveness")
        try:
            response = await stub.Check(request, timeout=TIMEOUT_SECONDS)
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name} {error.details()}"
        name: str = health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)
        return name


def is_cut(answer: str) -> bool:
    """The connection was ended by the other side: TLS 1.3 tells a client nothing more."""
    return any(text in answer for text in ("Socket closed", "reset by peer", "Broken pipe"))


async def shown_by(address: str) -> bytes:
    """The certificate that a new connection is shown, in DER."""
    host, port = address.split(":")

    def get() -> bytes:
        return ssl.PEM_cert_to_DER_cert(ssl.get_server_certificate((host, int(port)), timeout=TIMEOUT_SECONDS))

    return await asyncio.to_thread(get)


def der(pair: Pair) -> bytes:
    return ssl.PEM_cert_to_DER_cert(pair.cert.read_text())


async def test_a_caller_that_trusts_the_authority_is_answered(server: Server, ours: Authority) -> None:
    assert await ask(server.address, PemFiles(ca=ours.cert)) == "SERVING"


async def test_a_server_of_another_authority_is_refused(server: Server, stranger: Authority) -> None:
    assert "CERTIFICATE_VERIFY_FAILED" in await ask(server.address, PemFiles(ca=stranger.cert))


async def test_a_caller_without_tls_is_cut_off(server: Server) -> None:
    assert is_cut(await ask(server.address, None))


async def test_a_server_without_tls_is_refused_by_who_wants_it(ours: Authority) -> None:
    async with serving() as plain:
        assert "WRONG_VERSION_NUMBER" in await ask(plain.address, PemFiles(ca=ours.cert))


async def test_a_certificate_for_another_name_is_refused(ours: Authority) -> None:
    elsewhere = ours.issue("elsewhere", "DNS:elsewhere.example")
    async with serving(tls_cert=elsewhere.cert, tls_key=elsewhere.key) as server:
        assert "Hostname Verification" in await ask(server.address, PemFiles(ca=ours.cert))


async def test_a_certificate_whose_time_is_over_is_refused(ours: Authority) -> None:
    old = ours.issue("old", ended=True)
    async with serving(tls_cert=old.cert, tls_key=old.key) as server:
        assert "certificate has expired" in await ask(server.address, PemFiles(ca=ours.cert))


async def test_with_mutual_tls_a_caller_of_the_same_authority_is_answered(
    mutual: Server, ours: Authority, pair: Pair
) -> None:
    assert await ask(mutual.address, PemFiles(pair.cert, pair.key, ours.cert)) == "SERVING"


async def test_with_mutual_tls_a_caller_without_a_certificate_is_cut_off(mutual: Server, ours: Authority) -> None:
    assert is_cut(await ask(mutual.address, PemFiles(ca=ours.cert)))


async def test_with_mutual_tls_a_caller_of_another_authority_is_cut_off(
    mutual: Server, ours: Authority, stranger: Authority
) -> None:
    theirs = stranger.issue("caller")
    assert is_cut(await ask(mutual.address, PemFiles(theirs.cert, theirs.key, ours.cert)))


async def test_with_mutual_tls_a_caller_whose_time_is_over_is_cut_off(mutual: Server, ours: Authority) -> None:
    old = ours.issue("old-caller", ended=True)
    assert is_cut(await ask(mutual.address, PemFiles(old.cert, old.key, ours.cert)))


async def test_probes_have_a_port_without_tls_that_answers_nothing_but_health(ours: Authority, pair: Pair) -> None:
    async with serving(tls_cert=pair.cert, tls_key=pair.key, health_port=0) as server:
        assert await ask(server.health_address, None) == "SERVING"
        async with connect(server.health_address) as channel:
            reflect: Any = channel.unary_unary("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
            with pytest.raises(grpc.aio.AioRpcError) as refusal:
                await reflect(b"", timeout=TIMEOUT_SECONDS)
        assert refusal.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_there_is_no_such_port_unless_it_is_asked_for(server: Server) -> None:
    assert not hasattr(server, "health_address")


async def test_a_taken_health_port_is_named(server: Server, pair: Pair) -> None:
    port = int(server.address.rpartition(":")[2])
    with pytest.raises(OSError, match=rf"cannot listen on 127.0.0.1:{port}"):
        async with serving(health_port=port):
            pass


async def test_new_connections_are_shown_the_new_certificate_and_old_ones_go_on(
    ours: Authority, pair: Pair, tmp_path: Path
) -> None:
    installed, second = pair.install(tmp_path), ours.issue("second")
    async with (
        serving(tls_cert=installed.cert, tls_key=installed.key) as server,
        connect(server.address, tls=PemFiles(ca=ours.cert)) as channel,
    ):
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="readiness"))
        await watch.read()
        assert await shown_by(server.address) == der(pair)
        second.install(tmp_path)
        assert await shown_by(server.address) == der(second)
        await server.set_ready(True)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING


async def test_a_certificate_whose_key_has_not_come_yet_is_not_shown(
    ours: Authority, pair: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    installed, second = pair.install(tmp_path), ours.issue("third")
    async with serving(tls_cert=installed.cert, tls_key=installed.key) as server:
        installed.cert.write_bytes(second.cert.read_bytes())
        assert await shown_by(server.address) == der(pair)
        assert "does not belong to the certificate" in caplog.text
        installed.key.write_bytes(second.key.read_bytes())
        assert await shown_by(server.address) == der(second)


async def test_connections_are_taken_while_the_files_are_away(ours: Authority, pair: Pair, tmp_path: Path) -> None:
    installed = pair.install(tmp_path)
    async with serving(tls_cert=installed.cert, tls_key=installed.key) as server:
        installed.cert.unlink()
        assert await ask(server.address, PemFiles(ca=ours.cert)) == "SERVING"


@pytest.fixture
def caller(ours: Authority, tmp_path: Path) -> PemFiles:
    """Files that tests replace."""
    installed = ours.issue("first-caller").install(tmp_path)
    return PemFiles(installed.cert, installed.key, ours.cert)


async def test_a_channel_shows_its_new_certificate_to_the_next_call(
    mutual: Server, ours: Authority, stranger: Authority, caller: PemFiles, tmp_path: Path
) -> None:
    """That of a stranger is refused, so it was shown."""
    async with connect(mutual.address, tls=caller) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="liveness")
        await stub.Check(request, timeout=TIMEOUT_SECONDS)
        stranger.issue("next-caller").install(tmp_path)
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await stub.Check(request, timeout=TIMEOUT_SECONDS)
        assert is_cut(str(refusal.value.details()))
        ours.issue("last-caller").install(tmp_path)
        await stub.Check(request, timeout=TIMEOUT_SECONDS)


async def test_a_stream_lives_on_when_its_channel_gets_another_certificate(
    mutual: Server, ours: Authority, caller: PemFiles, tmp_path: Path
) -> None:
    async with connect(mutual.address, tls=caller) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="readiness")
        watch = stub.Watch(request)
        await watch.read()
        ours.issue("another-caller").install(tmp_path)
        await stub.Check(request, timeout=TIMEOUT_SECONDS)
        await mutual.set_ready(True)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    assert watch.cancelled()


def test_what_did_not_change_is_not_read_again(pair: Pair, tmp_path: Path) -> None:
    installed = pair.install(tmp_path)
    renewed = RenewedPem(PemFiles(installed.cert, installed.key))
    assert not renewed.renew()
    stat = installed.cert.stat()
    os.utime(installed.cert, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert not renewed.renew()


def test_the_end_of_the_first_certificate_to_end_is_known(ours: Authority, pair: Pair) -> None:
    old = ours.issue("gone", ended=True)
    early, late = PemFiles(old.cert, old.key, ours.cert).read().expires, PemFiles(pair.cert, pair.key).read().expires
    assert early is not None
    assert late is not None
    assert early < late


def bad_files(ours: Authority, pair: Pair, folder: Path) -> dict[str, tuple[PemFiles, str]]:
    """What is wrong -> files, and what is said of them."""
    text, other = folder / "text", ours.issue("other")
    text.write_text("no certificate")
    good = PemFiles(pair.cert, pair.key, ours.cert)
    return {
        "missing certificate": (replace(good, cert=folder / "none"), "none cannot be read: No such file"),
        "missing key": (replace(good, key=folder / "none"), "none cannot be read: No such file"),
        "missing authority": (replace(good, ca=folder / "none"), "none cannot be read: No such file"),
        "a folder": (replace(good, cert=folder), "cannot be read: Is a directory"),
        "a text": (replace(good, cert=text), "text holds no certificate in PEM form"),
        "a text for a key": (replace(good, key=text), "text holds no private key in PEM form"),
        "a key for a certificate": (replace(good, cert=pair.key), "holds no certificate in PEM form"),
        "a key of another": (replace(good, key=other.key), "does not belong to the certificate"),
        "an authority that is none": (replace(good, ca=text), "text holds no certificate in PEM form"),
    }


def test_files_that_cannot_be_used_are_named(ours: Authority, pair: Pair, tmp_path: Path) -> None:
    for files, sentence in bad_files(ours, pair, tmp_path).values():
        with pytest.raises((OSError, ValueError), match=sentence):
            files.read()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tls_cert": Path("a")}, "tls_cert and tls_key need each other"),
        ({"tls_key": Path("a")}, "tls_cert and tls_key need each other"),
        ({"tls_client_cert": Path("a"), "tls_ca": Path("c")}, "tls_client_cert and tls_client_key need each other"),
        ({"tls_require_client": True, "tls_ca": Path("c")}, "tls_require_client needs tls_cert and tls_ca"),
        ({"tls_require_client": True, "tls_cert": Path("a"), "tls_key": Path("b")}, "needs tls_cert and tls_ca"),
        ({"tls_roles": True, "tls_cert": Path("a"), "tls_key": Path("b")}, "tls_roles needs tls_require_client"),
        ({"tls_client_cert": Path("a"), "tls_client_key": Path("b")}, "tls_client_cert needs tls_ca"),
        ({"health_port": 65536}, "health_port is 65536"),
    ],
)
def test_options_that_need_another_say_so(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ServiceConfig(**options)


def test_services_are_shown_a_certificate_of_its_own_when_there_is_one() -> None:
    paths: dict[str, Any] = {name: Path(name) for name in ("cert", "key", "ca", "client_cert", "client_key")}
    config = ServiceConfig(**{f"tls_{name}": path for name, path in paths.items()})
    assert config.client_files == PemFiles(paths["client_cert"], paths["client_key"], paths["ca"])
    plain = replace(config, tls_client_cert=None, tls_client_key=None)
    assert plain.client_files == PemFiles(paths["cert"], paths["key"], paths["ca"])
    assert ServiceConfig().client_files is None


async def test_when_the_certificate_ends_is_exposed_and_follows_a_new_one(
    ours: Authority, pair: Pair, tmp_path: Path
) -> None:
    def exposed(server: Server) -> float | None:
        return server.registry.get_sample_value("loraplex_tls_certificate_expiry_timestamp_seconds")

    installed, old = pair.install(tmp_path), ours.issue("at-its-end", ended=True)
    async with serving(tls_cert=installed.cert, tls_key=installed.key) as server, serving() as plain:
        assert exposed(plain) is None
        first = PemFiles(pair.cert, pair.key).read().expires
        assert first is not None
        assert exposed(server) == first.timestamp()
        old.install(tmp_path)
        await shown_by(server.address)
        assert (exposed(server) or 0.0) < first.timestamp()
