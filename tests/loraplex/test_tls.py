"""The clients and the command over TLS: what they trust, what they show, and what they say when that is not enough."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from loraplex import AsyncClient, Client
from loraplex.command import main
from loraplex.errors import Unavailable, tls_diagnosis
from loraplex.tls import Tls, TlsError
from tests.certificates import Authority, Pair, authority
from tests.loraplex import fakes


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return authority(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def pair(ours: Authority) -> Pair:
    return ours.issue("gateway")


@contextmanager
def gateway_of(pair: Pair, callers: Authority | None = None) -> Iterator[str]:
    """Its address; with `callers` it asks them for a certificate."""
    keys = [(pair.key.read_bytes(), pair.cert.read_bytes())]
    authorities = None if callers is None else callers.cert.read_bytes()
    credentials = grpc.ssl_server_credentials(keys, authorities, require_client_auth=callers is not None)
    with fakes.running(credentials) as (_, address):
        yield address


@pytest.fixture
def gateway(pair: Pair) -> Iterator[str]:
    with gateway_of(pair) as address:
        yield address


@pytest.fixture
def careful_gateway(pair: Pair, ours: Authority) -> Iterator[str]:
    with gateway_of(pair, ours) as address:
        yield address


def refusal(address: str, **files: Any) -> str:
    """What `models()` says."""
    with Client(address, **files) as client, pytest.raises(Unavailable) as caught:
        client.models()
    assert caught.value.reason == "TLS_REFUSED"
    return caught.value.message


def test_the_client_trusts_the_authority_it_was_given(gateway: str, ours: Authority) -> None:
    with Client(gateway, ca=ours.cert) as client:
        assert client.models()


async def test_so_does_the_client_of_an_event_loop(gateway: str, ours: Authority) -> None:
    async with AsyncClient(gateway, ca=str(ours.cert)) as client:
        assert await client.models()


def test_the_client_shows_its_certificate(careful_gateway: str, ours: Authority) -> None:
    caller = ours.issue("caller")
    with Client(careful_gateway, ca=ours.cert, cert=caller.cert, key=caller.key) as client:
        assert client.models()


async def test_the_event_loops_client_shows_its_certificate(careful_gateway: str, ours: Authority) -> None:
    caller = ours.issue("caller")
    async with AsyncClient(careful_gateway, ca=ours.cert, cert=caller.cert, key=caller.key) as client:
        assert await client.models()


def test_without_tls_it_hears_that_the_gateway_wants_it(gateway: str) -> None:
    assert f"{gateway} hangs up: it wants TLS" in refusal(gateway)


def test_without_a_certificate_it_hears_that_the_gateway_may_want_one(careful_gateway: str, ours: Authority) -> None:
    assert "or a certificate of its callers" in refusal(careful_gateway, ca=ours.cert)


def test_the_wrong_authority_is_said_to_be_wrong(gateway: str, tmp_path: Path) -> None:
    other = authority(tmp_path, "other")
    assert f"the certificate of {gateway} has expired, or is of another authority" in refusal(gateway, ca=other.cert)


def test_the_public_authorities_know_nothing_of_ours(gateway: str) -> None:
    assert "is of another authority" in refusal(gateway, ca="system")


def test_another_name_is_said_to_be_another(ours: Authority) -> None:
    with gateway_of(ours.issue("elsewhere", "DNS:elsewhere.example")) as address:
        assert f"the certificate of {address} is for another name" in refusal(address, ca=ours.cert)


def test_a_gateway_without_tls_is_said_to_have_none(ours: Authority) -> None:
    with fakes.running() as (_, address):
        assert f"{address} does not speak TLS" in refusal(address, ca=ours.cert)


@pytest.mark.parametrize(
    "details",
    [
        "failed to connect to all addresses; last error: UNKNOWN: connect: Connection refused (111)",
        "Socket closed",
        "the scheduler is away",
    ],
)
def test_a_failure_that_is_not_about_tls_is_not_said_to_be(details: str) -> None:
    assert tls_diagnosis("here:1", details) == ""


def test_files_that_cannot_be_used_are_named(ours: Authority, pair: Pair, tmp_path: Path) -> None:
    text, other = tmp_path / "text", ours.issue("other")
    text.write_text("no certificate")
    for tls, sentence in (
        (Tls(ca=tmp_path / "none"), "none cannot be read: No such file"),
        (Tls(ca=text), "text holds no certificate in PEM form"),
        (Tls(ca=ours.cert, cert=tmp_path / "none", key=pair.key), "none cannot be read: No such file"),
        (Tls(ca=ours.cert, cert=pair.cert, key=tmp_path / "none"), "none cannot be read: No such file"),
        (Tls(ca=ours.cert, cert=pair.cert, key=other.key), "does not belong to the certificate"),
        (Tls(ca=ours.cert, cert=text, key=pair.key), "are no certificate and plain key"),
    ):
        with pytest.raises(TlsError, match=sentence):
            tls.channel("127.0.0.1:1")


@pytest.mark.parametrize(
    ("files", "sentence"),
    [({"cert": "c"}, "cert and key need each other"), ({"cert": "c", "key": "k"}, "cert needs ca")],
)
def test_a_file_without_the_one_it_needs_is_refused(files: dict[str, str], sentence: str) -> None:
    with pytest.raises(TlsError, match=sentence):
        Tls(**files)


@pytest.mark.parametrize("command", [["status"], ["generate", "x"], ["adapters", "list"]], ids=" ".join)
def test_the_command_speaks_tls(
    command: list[str], gateway: str, ours: Authority, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--gateway", gateway]
    assert main([*command, *options]) == 1
    error = capsys.readouterr().err
    assert "TLS_REFUSED" in error
    assert "Next: see --ca, --cert and --key" in error
    assert main([*command, *options, "--ca", str(ours.cert)]) == 0


@pytest.mark.parametrize("command", ["explain", "memory"])
def test_what_asks_the_scheduler_speaks_tls(
    command: str, careful_gateway: str, ours: Authority, capsys: pytest.CaptureFixture[str]
) -> None:
    caller = ours.issue("operator")
    arguments = [command, *(["a-request"] if command == "explain" else []), "--scheduler", careful_gateway]
    assert main([*arguments, "--ca", str(ours.cert)]) == 1
    assert "TLS_REFUSED" in capsys.readouterr().err
    main([*arguments, "--ca", str(ours.cert), "--cert", str(caller.cert), "--key", str(caller.key)])
    assert "TLS_REFUSED" not in capsys.readouterr().err


def test_the_authority_may_come_from_the_environment(
    gateway: str, ours: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAPLEX_CA", str(ours.cert))
    assert main(["status", "--gateway", gateway]) == 0


def test_a_file_that_is_missing_is_one_line(gateway: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--gateway", gateway, "--ca", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err == f"loraplex: {tmp_path / 'none'} cannot be read: No such file or directory\n"
