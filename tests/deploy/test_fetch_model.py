"""What an init container does to get a model: the whole archive is verified before anything of it is unpacked."""

import hashlib
import io
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from deploy.fetch_model import fetch
from tests.checkout import ROOT


def archive(folder: Path, *names: str) -> tuple[str, str]:
    """(URL, sha256) of a tar file with these members."""
    path = folder / "model.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 2
            tar.addfile(member, io.BytesIO(b"{}"))
    return path.as_uri(), hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    return folder


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_verified_archive_is_unpacked(tmp_path: Path, model: Path) -> None:
    fetch(*archive(tmp_path, "config.json", "model.safetensors"), model)
    assert names_in(model) == {"config.json", "model.safetensors", ".sha256"}


def test_a_second_start_asks_nobody(tmp_path: Path, model: Path) -> None:
    url, sha256 = archive(tmp_path, "config.json")
    fetch(url, sha256, model)
    assert "already" in fetch("file:///nowhere", sha256, model)


def test_other_bytes_leave_nothing_behind(tmp_path: Path, model: Path) -> None:
    url, _ = archive(tmp_path, "config.json")
    with pytest.raises(ValueError, match="the sha256 of"):
        fetch(url, "0" * 64, model)
    assert names_in(model) == set()


def test_a_name_that_leads_outside_is_refused(tmp_path: Path, model: Path) -> None:
    with pytest.raises(tarfile.OutsideDestinationError):
        fetch(*archive(tmp_path, "config.json", "../outside"), model)
    assert not (tmp_path / "outside").exists()


def test_an_archive_without_a_config_is_no_model(tmp_path: Path, model: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        fetch(*archive(tmp_path, "weights"), model)
    assert ".sha256" not in names_in(model)


@pytest.mark.parametrize(("sha256", "code"), [("", 0), ("0" * 64, 1)], ids=["right", "wrong"])
def test_the_command_says_by_its_code_whether_the_model_is_there(
    tmp_path: Path, model: Path, sha256: str, code: int
) -> None:
    url, right = archive(tmp_path, "config.json")
    command = [sys.executable, "-m", "deploy.fetch_model", url, sha256 or right, str(model)]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60).returncode == code
