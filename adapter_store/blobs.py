"""Adapters on disk.

    data_dir/staging/RANDOM/      being received and checked; emptied when the store starts
    data_dir/objects/DIGEST/      whole, read-only, never changed
        adapter_config.json  adapter_model.safetensors  [chat_template.jinja]  packed.DTYPE  packed.DTYPE.layout

An adapter moves from one to the other by a single rename. No name that a user chose is ever a path.
"""

import fcntl
import hashlib
import os
import secrets
import shutil
import threading
from collections.abc import Mapping
from io import FileIO
from pathlib import Path

from adapter_store.disk import create, disk_errors, open_existing, sync_folder, write_all
from adapter_store.names import is_digest
from common.errors import InvalidArgument

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
CHAT_TEMPLATE = "chat_template.jinja"


class StagedAdapter:
    """The folder one upload fills: invisible, and gone unless it is published. May be used from several threads."""

    def __init__(self, directory: Path, limits: Mapping[str, int]) -> None:
        directory.mkdir(mode=0o700)
        self.directory = directory
        self.sha256: dict[str, str] = {}
        self._limits = limits
        self._lock = threading.Lock()
        self._name = ""
        self._file: FileIO | None = None
        self._digest = hashlib.sha256()
        self._size_bytes = 0

    def append(self, name: str, data: bytes) -> None:
        """Adds the next bytes of a file. Raises InvalidArgument when the file is over its limit or came before another
        one, ResourceExhausted when the disk is full."""
        with self._lock, disk_errors():
            if name != self._name:
                self._begin(name)
            if self._file is None:
                raise ValueError("the staged adapter is discarded")
            self._size_bytes += len(data)
            if self._size_bytes > self._limits[name]:
                message = f"{name} is larger than the limit of {self._limits[name]} bytes"
                raise InvalidArgument("FILE_TOO_LARGE", message, metadata={"limit_bytes": str(self._limits[name])})
            self._digest.update(data)
            write_all(self._file, data)

    def seal(self) -> None:
        """Ends the last file; after it the files are durable and `sha256` has all of them."""
        with self._lock, disk_errors():
            self._end()

    def discard(self) -> None:
        """Removes everything; waits for a write in progress. Safe to call again."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None
            shutil.rmtree(self.directory, ignore_errors=True)

    def open(self, name: str) -> FileIO:
        return open_existing(self.directory / name)

    def read(self, name: str) -> bytes:
        with self.open(name) as file:
            return file.read()

    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.stat().st_size for file in self.directory.iterdir())

    def _begin(self, name: str) -> None:
        self._end()
        if name in self.sha256:
            raise InvalidArgument("FILES_INTERLEAVED", f"{name} comes in two parts; its chunks must follow each other")
        self._file, self._name = create(self.directory / name), name
        self._digest, self._size_bytes = hashlib.sha256(), 0

    def _end(self) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None
            self.sha256[self._name] = self._digest.hexdigest()


class Blobs:
    """The folders of one store. Everything here may block: call it from a thread."""

    def __init__(self, data_dir: Path, limits: Mapping[str, int]) -> None:
        """`limits` gives the most bytes of each file by name."""
        self._staging, self._objects = data_dir / "staging", data_dir / "objects"
        self._limits = limits
        self._data_dir = data_dir
        self._lock: FileIO | None = None

    def start(self) -> None:
        """Makes the folders and removes what a crash left in staging.

        Raises OSError when another store uses the folder.
        """
        for folder in (self._data_dir, self._staging, self._objects):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = FileIO(self._data_dir / "lock", "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise OSError(f"another adapter store uses {self._data_dir}") from None
        for leftover in self._staging.iterdir():
            _remove(leftover)

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def stage(self) -> StagedAdapter:
        with disk_errors():
            return StagedAdapter(self._staging / secrets.token_hex(16), self._limits)

    def publish(self, staged: StagedAdapter, digest: str) -> None:
        """Makes a sealed folder the object `digest`, durably; the same object already there stays as it is."""
        with disk_errors():
            for file in staged.directory.iterdir():
                file.chmod(0o400)
            sync_folder(staged.directory)
            target = self._path(digest)
            if target.exists():
                staged.discard()
            else:
                staged.directory.rename(target)
                sync_folder(self._objects)

    def delete(self, digest: str) -> None:
        """Removes an object: at once by name, then its bytes. Open readers keep theirs. Missing is fine."""
        doomed = self._staging / secrets.token_hex(16)
        try:
            self._path(digest).rename(doomed)
        except FileNotFoundError:
            return
        sync_folder(self._objects)
        shutil.rmtree(doomed)

    def open(self, digest: str, name: str) -> FileIO:
        """A file of an object. Raises OSError when it is missing."""
        return open_existing(self._path(digest) / name)

    def disk_usage(self) -> tuple[int, int]:
        """(total, free) bytes of the disk."""
        usage = shutil.disk_usage(self._data_dir)
        return usage.total, usage.free

    def _path(self, digest: str) -> Path:
        if not is_digest(digest):
            raise ValueError("not a digest")
        return self._objects / digest


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
