"""What is acknowledged outlives a power cut: kill -9 cannot show that, the order of the calls of the system can."""

import os
from pathlib import Path
from typing import Any

import pytest

from tests.adapter_store.crafted import make_files
from tests.adapter_store.fakes import StoreClient


class Calls:
    """(call, path) of every sync, rename and link of this process, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[str, Path]] = []
        fsync, rename, link = os.fsync, Path.rename, os.link

        def seen_fsync(descriptor: int) -> None:
            fsync(descriptor)
            self.seen.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))

        def seen_rename(path: Path, target: Path) -> Path:
            result = rename(path, target)
            self.seen.append(("rename", Path(target)))
            return result

        def seen_link(source: Any, target: Any) -> None:
            link(source, target)
            self.seen.append(("link", Path(target)))

        monkeypatch.setattr(os, "fsync", seen_fsync)
        monkeypatch.setattr(Path, "rename", seen_rename)
        monkeypatch.setattr(os, "link", seen_link)

    def synced(self, start: int, end: int | None = None) -> set[Path]:
        return {path for call, path in self.seen[start:end] if call == "sync"}

    def place(self, call: str, folder: Path) -> int:
        """Of the one such call whose target is in the folder."""
        (found,) = [place for place, (name, path) in enumerate(self.seen) if name == call and path.parent == folder]
        return found


async def test_an_object_is_on_disk_before_its_name_and_its_name_before_the_answer(
    client: StoreClient, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(monkeypatch)
    version = (await client.upload("a", make_files())).adapter.adapter_version
    renamed, linked = calls.place("rename", data_dir / "objects"), calls.place("link", data_dir / "journal")
    before = calls.synced(0, renamed)
    (staged,) = {path for path in before if path.parent == data_dir / "staging" and not path.name.startswith("record")}
    files = {path.name for path in (data_dir / "objects" / version).iterdir()}
    assert {path.name for path in before if path.parent == staged} == files
    assert renamed < linked
    assert data_dir / "objects" in calls.synced(renamed, linked)
    (record,) = {path for path in calls.synced(0, linked) if path.name.startswith("record-")}
    assert record.parent == data_dir / "staging"
    assert data_dir / "journal" in calls.synced(linked)


async def test_a_removal_is_on_disk_before_the_answer(
    client: StoreClient, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await client.upload("a", make_files())
    calls = Calls(monkeypatch)
    await client.delete("a")
    linked = calls.place("link", data_dir / "journal")
    assert [path.name.partition("-")[0] for path in calls.synced(0, linked)] == ["record"]
    assert calls.synced(linked) == {data_dir / "journal"}
