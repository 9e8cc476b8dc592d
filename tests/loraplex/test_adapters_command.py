"""`loraplex adapters show|rm|alias|import|export`, and what an import takes from a folder that others made."""

import io
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from google.rpc import code_pb2

from loraplex.aio import AsyncClient
from loraplex.command import main
from tests.loraplex import fakes
from tests.loraplex.fakes import FakeGateway

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two adapters, one of them two folders deep, and a folder that is none."""
    for name in ("alpha", "team/Beta"):
        write_adapter(tmp_path / "tree" / name)
    (tmp_path / "tree" / "notes").mkdir()
    return tmp_path / "tree"


def write_adapter(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / CONFIG).write_bytes(b"{}")
    (folder / WEIGHTS).write_bytes(b"w" * 10)


def import_tree(tree: Path, address: str, *options: str) -> int:
    return main(["adapters", "import", str(tree), "--gateway", address, *options])


def uploaded(gateway: FakeGateway) -> list[str]:
    return [request[0].header.adapter_id for request in gateway.requests]


def test_show_says_what_an_adapter_changes(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapters", "show", "alpha", "--gateway", address]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["adapter", "alpha"]
    assert lines[-1].split() == ["q_proj", "2", "4-8", "0.0", "1.5"]


def test_rm_removes_each_id(address: str, gateway: FakeGateway, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapters", "rm", "alpha", "beta", "--gateway", address]) == 0
    assert capsys.readouterr().out == "removed alpha digest\nremoved beta digest\n"
    assert [request.adapter_id for request in gateway.requests] == ["alpha", "beta"]


def test_alias_points_to_what_another_id_points_to(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapters", "alias", "new", "alpha", "--gateway", address]) == 0
    assert capsys.readouterr().out == "new -> digest\n"


def test_alias_takes_a_version_as_it_is(address: str, gateway: FakeGateway) -> None:
    version = "0123456789abcdef" * 4
    assert main(["adapters", "alias", "new", version, "--expect", "f" * 64, "--gateway", address]) == 0
    (request,) = gateway.requests
    assert (request.adapter_version, request.expected_version) == (version, "f" * 64)


def test_export_writes_the_files(address: str, tmp_path: Path) -> None:
    assert main(["adapters", "export", "alpha", str(tmp_path / "out"), "--gateway", address]) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == {
        CONFIG: b"{}",
        WEIGHTS: b"one two",
    }


def test_an_export_that_breaks_leaves_nothing(address: str, gateway: FakeGateway, tmp_path: Path) -> None:
    gateway.failure = fakes.status(code_pb2.DATA_LOSS, "ADAPTER_DAMAGED", "damaged")
    assert main(["adapters", "export", "alpha", str(tmp_path / "out"), "--gateway", address]) == 1
    assert list((tmp_path / "out").iterdir()) == []


def test_an_export_overwrites_nothing(address: str, adapter_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapters", "export", "alpha", str(adapter_folder), "--gateway", address]) == 1
    assert "FOLDER_NOT_EMPTY" in capsys.readouterr().err


async def test_the_async_client_has_the_same_calls(address: str, tmp_path: Path) -> None:
    async with AsyncClient(address) as client:
        assert (await client.adapters.get("alpha")).modules[0].module == "q_proj"
        assert (await client.adapters.set_alias("b", "d")).adapter_version == "d"
        await client.adapters.export("alpha", tmp_path / "out")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == b"one two"


def test_import_uploads_a_tree(
    address: str, gateway: FakeGateway, tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert import_tree(tree, address) == 0
    assert uploaded(gateway) == ["alpha", "team-beta"]
    out = capsys.readouterr().out
    assert out.startswith("imported 2, unchanged 0, refused 0\nwarning: alpha: a warning\n")


def test_import_tells_what_was_refused_and_takes_the_rest(
    address: str, gateway: FakeGateway, tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tree / "alpha" / WEIGHTS).unlink()
    assert import_tree(tree, address) == 1
    assert uploaded(gateway) == ["team-beta"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "imported 1, unchanged 0, refused 1"
    assert lines[-2].split() == ["ADAPTER", "REASON", "WHY"]
    assert lines[-1].split()[:2] == ["alpha", "ADAPTER_FILE_MISSING"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_import_shows_a_bar_on_a_terminal_and_takes_it_away(
    address: str, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tree / "alpha" / WEIGHTS).unlink()
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    import_tree(tree, address)
    shown = terminal.getvalue().split("\r\x1b[K")[1:]
    assert [line.partition("] ")[2] for line in shown[:-1]] == ["0 of 2: alpha", "1 of 2: team-beta"]
    first, second = (line.partition("]")[0].count("#") for line in shown[:-1])
    assert 0 == first < second
    assert shown[-1] == ""


def test_import_shows_no_bar_elsewhere(address: str, tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import_tree(tree, address)
    assert capsys.readouterr().err == ""


def test_import_stops_when_nobody_takes_anything(
    address: str, gateway: FakeGateway, tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.failure = fakes.status(code_pb2.UNAVAILABLE, "REGISTRY_UNAVAILABLE", "no registry")
    assert import_tree(tree, address) == 1
    assert len(gateway.requests) == 1
    assert "REGISTRY_UNAVAILABLE" in capsys.readouterr().err


def test_two_folders_of_one_id_are_refused(address: str, tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_adapter(tree / "team-beta")
    assert import_tree(tree, address) == 1
    assert "ADAPTER_ID_TWICE" in capsys.readouterr().err


def make_link(path: Path) -> None:
    (path.parent / "elsewhere").write_bytes(b"w")
    path.symlink_to("elsewhere")


def make_hard_link(path: Path) -> None:
    (path.parent / "elsewhere").write_bytes(b"w")
    path.hardlink_to(path.parent / "elsewhere")


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as found:
        # The path of a socket must be short.
        found.bind(os.path.relpath(path))


def make_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def make_sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(8 * 1024**3)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, "chat_template.jinja"])
@pytest.mark.parametrize(
    "make",
    [make_link, make_hard_link, os.mkfifo, Path.mkdir, make_socket, make_sparse, make_device],
    ids=["link", "hard-link", "fifo", "folder", "socket", "sparse", "device"],
)
def test_c04_only_plain_files_are_imported(
    address: str,
    gateway: FakeGateway,
    tree: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    make: Callable[[Path], Any],
    name: str,
) -> None:
    monkeypatch.chdir(tree)
    (tree / "alpha" / name).unlink(missing_ok=True)
    make(tree / "alpha" / name)
    assert import_tree(tree, address) == 1
    assert uploaded(gateway) == ["team-beta"]
    assert "FILE_NOT_PLAIN" in capsys.readouterr().out


def test_what_a_trainer_leaves_beside_an_adapter_is_not_sent(address: str, gateway: FakeGateway, tree: Path) -> None:
    (tree / "alpha" / "training_args.bin").write_bytes(b"pickle")
    assert import_tree(tree, address) == 0
    assert len(gateway.requests[0]) == 3


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "ADAPTER_MODEL.PKL"])
def test_c06_a_folder_with_pickled_weights_is_refused(
    address: str, gateway: FakeGateway, tree: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    canary = tree / "canary"
    (tree / "alpha" / name).write_bytes(f"cbuiltins\nopen\n(S'{canary}'\nS'w'\ntR.".encode())
    assert import_tree(tree, address) == 1
    assert uploaded(gateway) == ["team-beta"]
    assert "CODE_IN_FOLDER" in capsys.readouterr().out
    assert not canary.exists()
