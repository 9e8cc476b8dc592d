"""Redis behind TLS with client certificates, an ACL user, and a password that stands in a file."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis.exceptions import RedisError

from adapter_store.config import StoreConfig
from common.channel import connect
from common.errors import Unavailable
from common.redis_client import RedisAddress
from tests.adapter_store.conftest import StartStore
from tests.adapter_store.crafted import make_files
from tests.adapter_store.fakes import StoreClient
from tests.adapter_store.redis_server import PATIENT_SECONDS, RedisServer, free_port

PASSWORD = "canary-4711"
# What docs/operations.md tells to grant.
RIGHTS = "~loraplex:* resetchannels -@all +@hash +@sortedset +@stream +@scripting +@keyspace +@connection -@dangerous"

Options = dict[str, str | float | Path]


def openssl(*arguments: str, cwd: Path) -> None:
    subprocess.run(["openssl", *arguments], cwd=cwd, check=True, capture_output=True)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, and a server and a client that it signed; and another authority."""
    folder = tmp_path_factory.mktemp("certificates")
    for authority in ("ca", "other-ca"):
        subject = ["-subj", f"/CN={authority}", "-days", "2"]
        files = ["-keyout", f"{authority}.key", "-out", f"{authority}.crt"]
        openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", *files, *subject, cwd=folder)
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1")
    for name in ("server", "client"):
        files = ["-keyout", f"{name}.key", "-out", f"{name}.csr"]
        openssl("req", "-newkey", "rsa:2048", "-nodes", *files, "-subj", f"/CN={name}", cwd=folder)
        signer = ["-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "names"]
        openssl("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.crt", *signer, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def secure_redis(certificates: Path) -> Iterator[str]:
    """The address of a server that wants all of it."""
    port = free_port()
    tls = ["--tls-port", str(port), "--tls-auth-clients", "yes", "--tls-ca-cert-file", str(certificates / "ca.crt")]
    tls += ["--tls-cert-file", str(certificates / "server.crt"), "--tls-key-file", str(certificates / "server.key")]
    server = RedisServer(certificates / "redis", *tls)
    server.start()
    server.call("ACL", "SETUSER", "store", "on", f">{PASSWORD}", *RIGHTS.split())
    yield f"rediss://127.0.0.1:{port}/0"
    server.stop()


@pytest.fixture
def options(secure_redis: str, certificates: Path, tmp_path: Path) -> Options:
    password = tmp_path / "password"
    password.write_text(PASSWORD + "\n")
    return {
        "redis": secure_redis,
        "redis_timeout_seconds": PATIENT_SECONDS,
        "redis_username": "store",
        "redis_password_file": password,
        "redis_tls_ca": certificates / "ca.crt",
        "redis_tls_cert": certificates / "client.crt",
        "redis_tls_key": certificates / "client.key",
        "redis_prefix": f"loraplex:{tmp_path.name}",
    }


async def test_a_store_with_the_right_papers_works(start_store: StartStore, options: Options) -> None:
    for _ in range(2):
        service = await start_store(**options)
        async with connect(service.server.address) as channel:
            client = StoreClient(channel)
            adapter = (await client.upload("a", make_files(), replace=True)).adapter
            await client.set_alias("b", adapter.adapter_version)
            await client.delete("b")
        await service.store.sweep()
        await service.stop()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param("redis_username", "nobody", id="unknown-user"),
        pytest.param("redis_prefix", "elsewhere", id="keys-of-others"),
        pytest.param("redis_tls_ca", "other-ca.crt", id="other-authority"),
        pytest.param("redis_tls_cert", None, id="no-certificate"),
    ],
)
async def test_a_store_with_wrong_papers_writes_nothing(
    start_store: StartStore,
    options: Options,
    certificates: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    value: str | None,
) -> None:
    if name == "redis_tls_cert":
        del options["redis_tls_cert"], options["redis_tls_key"]
    else:
        options[name] = certificates / str(value) if name == "redis_tls_ca" else str(value)
    service = await start_store(**options)
    async with connect(service.server.address) as channel:
        client = StoreClient(channel)
        with pytest.raises(Unavailable) as caught:
            await client.upload("a", make_files())
        assert list((await client.page()).adapters) == []
    assert PASSWORD not in caught.value.message + caplog.text


async def test_a_password_that_cannot_be_read_ends_the_start(
    start_store: StartStore, options: Options, tmp_path: Path
) -> None:
    options["redis_password_file"] = tmp_path / "missing"
    with pytest.raises(OSError, match="missing"):
        await start_store(**options)


def test_credentials_in_the_address_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="redis holds credentials") as caught:
        StoreConfig(data_dir=tmp_path, redis=f"redis://store:{PASSWORD}@127.0.0.1:6379")
    assert PASSWORD not in str(caught.value)


def test_the_password_is_not_in_what_is_printed_of_the_address(tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text(PASSWORD)
    assert PASSWORD not in repr(RedisAddress("redis://127.0.0.1", password_file=path))


async def test_each_command_is_timed_also_one_that_fails(tmp_path: Path) -> None:
    server, seconds = RedisServer(tmp_path / "redis"), list[float]()
    server.start()
    client = RedisAddress(server.url, timeout_seconds=PATIENT_SECONDS).client(observe=seconds.append)
    try:
        await client.set("a", "b")
        assert await client.get("a") == "b"
    finally:
        server.stop()
    with pytest.raises(RedisError):
        await client.get("a")
    await client.aclose()
    assert len(seconds) == 3
    assert min(seconds) > 0
