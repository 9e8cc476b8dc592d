"""Folders of adapters on this side: what a tree holds, files that are only files, and a folder written whole."""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from loraplex.errors import InvalidArgument
from loraplex.requests import UPLOAD_FILES
from loraplex.v1 import adapter_store_pb2

CONFIG = "adapter_config.json"
WEIGHTS_STEM = "adapter_model"
# Weights that run code when they are loaded. A trainer's own files of these kinds are never read.
CODE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
# A disk gives a file at least this share of its bytes, unless the file has holes.
MIN_STORED_SHARE = 0.5

_NAMES = {kind: name for name, kind in UPLOAD_FILES}
_BLOCK_BYTES = 512


def find_adapters(tree: Path) -> dict[str, Path]:
    """Adapter id -> folder, for every folder of a tree that has an adapter_config.json; links are not followed.

    The id is the path inside the tree, in lower case, its parts joined by a dash; that of the tree itself is its name.
    Raises InvalidArgument when the tree is no folder or two folders have the same id.
    """
    if not tree.is_dir():
        raise InvalidArgument("ADAPTER_FOLDER_MISSING", f"{tree} is not a folder")
    found: dict[str, Path] = {}
    for directory, folders, files in os.walk(tree):
        folders.sort()
        if CONFIG not in files and CONFIG not in folders:
            continue
        folder = Path(directory)
        adapter_id = "-".join(folder.relative_to(tree).parts or (tree.resolve().name,)).lower()
        if adapter_id in found:
            raise InvalidArgument("ADAPTER_ID_TWICE", f"{found[adapter_id]} and {folder} both have the id {adapter_id}")
        found[adapter_id] = folder
    return found


def check_folder(folder: Path) -> None:
    """Raises InvalidArgument when a file of an adapter is more, or less, than a plain file of this folder only."""
    for path in folder.iterdir():
        if path.stem.lower() == WEIGHTS_STEM and path.suffix.lower() in CODE_SUFFIXES:
            message = f"{path.name} can run code when it is loaded; save the adapter as safetensors, without it"
            raise InvalidArgument("CODE_IN_FOLDER", message)
    for name in _NAMES.values():
        if os.path.lexists(folder / name):
            open_plain(folder / name).close()


def open_plain(path: Path) -> BinaryIO:
    """Opens a regular file that has one name and no holes, without following a link or waiting for a writer.

    Raises InvalidArgument for anything else.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise InvalidArgument("FILE_NOT_PLAIN", f"{path.name} cannot be opened: {error.strerror}") from None
    problem = _problem(os.fstat(descriptor))
    if problem:
        os.close(descriptor)
        raise InvalidArgument("FILE_NOT_PLAIN", f"{path.name} {problem}")
    return os.fdopen(descriptor, "rb")


def _problem(status: os.stat_result) -> str:
    if not stat.S_ISREG(status.st_mode):
        return "is not a regular file"
    if status.st_nlink > 1:
        return "has another name elsewhere (a hard link)"
    if status.st_size > 1024 * 1024 and status.st_blocks * _BLOCK_BYTES < status.st_size * MIN_STORED_SHARE:
        return "is a sparse file"
    return ""


class FolderWriter:
    """Writes the files of an export; they have their names when all of them are whole, and leave nothing otherwise.

    Raises InvalidArgument when the folder holds something, OSError when it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise InvalidArgument("FOLDER_NOT_EMPTY", f"{folder} is not empty")
        self._folder = folder
        self._partial: dict[str, BinaryIO] = {}

    def add(self, response: adapter_store_pb2.ExportAdapterResponse) -> None:
        if response.HasField("chunk"):
            name = _NAMES[response.chunk.file]
            if name not in self._partial:
                self._partial[name] = self._path(name).open("xb")
            self._partial[name].write(response.chunk.data)

    def finish(self) -> None:
        for name, file in self._partial.items():
            file.close()
            self._path(name).rename(self._folder / name)

    def close(self) -> None:
        for name, file in self._partial.items():
            file.close()
            self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.partial"
