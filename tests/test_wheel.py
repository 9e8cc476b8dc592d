"""The wheel in an environment that holds nothing else: what it contains, what it needs, that it works."""

import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from loraplex.v1 import gateway_pb2, gateway_pb2_grpc
from tests.checkout import ROOT, tree_files

# The first test builds the wheel and its environment: two pip runs that may download.
pytestmark = pytest.mark.timeout(600)


def run(*command: str | Path, cwd: Path) -> str:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=500, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wheel")


@pytest.fixture(scope="module")
def wheel(workdir: Path) -> Path:
    """The wheel, built from a copy of the files in git: no stubs, no build output."""
    for path in tree_files():
        (workdir / "tree" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, workdir / "tree" / path)
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", workdir / "dist", workdir / "tree", cwd=workdir)
    (path,) = (workdir / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def bin_dir(workdir: Path, wheel: Path) -> Path:
    """Programs of an environment that holds the wheel and what it depends on."""
    venv.create(workdir / "venv", with_pip=True)
    programs = workdir / "venv" / "bin"
    run(programs / "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel, cwd=workdir)
    return programs


@pytest.fixture
def gateway() -> Iterator[str]:
    """Address of a gateway that answers with the name of the adapter and the prompt."""

    def answer(request: gateway_pb2.GenerateRequest, context: Any) -> gateway_pb2.GenerateResponse:
        output = gateway_pb2.Output(text=f"{request.adapter_id} says {request.text}")
        return gateway_pb2.GenerateResponse(outputs=[output])

    servicer: Any = gateway_pb2_grpc.GatewayServiceServicer
    instance = servicer()
    instance.Generate = answer
    server = grpc.server(ThreadPoolExecutor(1))
    gateway_pb2_grpc.add_GatewayServiceServicer_to_server(instance, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def metadata(wheel: Path, name: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (member for member in archive.namelist() if member.endswith(f".dist-info/{name}"))
        return archive.read(path).decode()


def test_loraplex_is_the_only_package_in_it(wheel: Path) -> None:
    assert metadata(wheel, "top_level.txt").split() == ["loraplex"]


def test_every_file_in_it_is_in_the_package_or_describes_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        folders = {name.split("/")[0].partition("-")[0] for name in archive.namelist()}
    assert folders == {"loraplex"}


def test_it_holds_typed_stubs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert names >= {"loraplex/py.typed", "loraplex/v1/gateway_pb2.py", "loraplex/v1/gateway_pb2_grpc.pyi"}


def test_the_command_explains_itself(bin_dir: Path, workdir: Path) -> None:
    assert "usage: loraplex" in run(bin_dir / "loraplex", "--help", cwd=workdir)


@pytest.mark.parametrize("package", ["numpy", "torch", "transformers"])
def test_it_needs_no_heavy_package(bin_dir: Path, workdir: Path, package: str) -> None:
    found = run(bin_dir / "python", "-c", f"import importlib.util as u; print(u.find_spec('{package}'))", cwd=workdir)
    assert found.strip() == "None"


def test_the_client_makes_a_call(bin_dir: Path, workdir: Path, gateway: str) -> None:
    program = (
        "import loraplex, sys\n"
        "with loraplex.Client(sys.argv[1]) as client:\n"
        "    print(client.generate('hello', adapter='parrot').text)\n"
    )
    assert run(bin_dir / "python", "-c", program, gateway, cwd=workdir) == "parrot says hello\n"
