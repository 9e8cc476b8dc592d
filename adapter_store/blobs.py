"""Adapters on disk.

    data_dir/staging/RANDOM/                 being received and checked; emptied when the store starts
    data_dir/instances/N/staging/RANDOM/     the same, of store N of several on one volume
    data_dir/objects/DIGEST/                 whole, read-only, never changed
        adapter_config.json  adapter_model.safetensors  [chat_template.jinja]  packed.DTYPE  packed.DTYPE.layout
        manifest.json
    data_dir/derived/DIGEST/                 packed strings made on demand, for other dtypes and for shards

An adapter moves from one to the other by a single rename. No name that a user chose is ever a path.
"""

import hashlib
import os
import secrets
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from adapter_store.disk import (
    check_room,
    create,
    disk_errors,
    open_existing,
    sync_folder,
    try_lock,
    write_all,
)
from adapter_store.failpoints import failpoint
from adapter_store.names import is_digest
from common.errors import InvalidArgument

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
CHAT_TEMPLATE = "chat_template.jinja"

MAX_INSTANCES = 64
# The free space of the disk is looked at once for so many bytes.
_ROOM_STEP_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class DiskLimits:
    """The most bytes of each file by name, and how many bytes of the disk stay free."""

    file_bytes: Mapping[str, int]
    reserve_bytes: int = 0


class StagedAdapter:
    """The folder one upload fills: invisible, and gone unless it is published. May be used from several threads."""

    def __init__(self, directory: Path, limits: DiskLimits) -> None:
        check_room(directory.parent, 0, limits.reserve_bytes)
        directory.mkdir(mode=0o700)
        self.directory = directory
        self.sha256: dict[str, str] = {}
        self._limits = limits
        self._lock = threading.Lock()
        self._name = ""
        self._file: FileIO | None = None
        self._digest = hashlib.sha256()
        self._size_bytes = 0
        self._room_bytes = 0
        failpoint("staging-open")

    def append(self, name: str, data: bytes) -> None:
        """Adds the next bytes of a file. Raises InvalidArgument when the file is over its limit or came before another
        one, ResourceExhausted when the disk is full or would be nearly so."""
        with self._lock, disk_errors():
            if name != self._name:
                self._begin(name)
            if self._file is None:
                raise ValueError("the staged adapter is discarded")
            self._size_bytes += len(data)
            limit_bytes = self._limits.file_bytes[name]
            if self._size_bytes > limit_bytes:
                message = f"{name} is larger than the limit of {limit_bytes} bytes"
                raise InvalidArgument("FILE_TOO_LARGE", message, metadata={"limit_bytes": str(limit_bytes)})
            if len(data) > self._room_bytes:
                self.check_room(_ROOM_STEP_BYTES)
                self._room_bytes = _ROOM_STEP_BYTES
            self._room_bytes -= len(data)
            self._digest.update(data)
            write_all(self._file, data)
            if name == WEIGHTS:
                failpoint("mid-chunk")

    def seal(self) -> None:
        """Ends the last file; after it `sha256` has all of them."""
        with self._lock:
            self._end()

    def sync(self) -> None:
        """Makes the sealed files durable."""
        with disk_errors():
            for name in self.sha256:
                with self.open(name) as file:
                    os.fsync(file.fileno())
        failpoint("after-fsync")

    def check_room(self, wanted_bytes: int) -> None:
        """Raises ResourceExhausted when so many bytes more would take from the disk's reserve."""
        check_room(self.directory, wanted_bytes, self._limits.reserve_bytes)

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
            self._file.close()
            self._file = None
            self.sha256[self._name] = self._digest.hexdigest()


class Blobs:
    """The folders of one store. Everything here may block: call it from a thread."""

    def __init__(self, data_dir: Path, limits: DiskLimits, *, shared: bool = False) -> None:
        """`shared`: other stores use the same volume, with a registry that they share too."""
        self._data_dir = data_dir
        self._objects, self._derived = data_dir / "objects", data_dir / "derived"
        self._limits = limits
        self._shared = shared
        self._locks: list[FileIO] = []

    def start(self) -> None:
        """Makes the folders, takes one for this process, and removes what a crash left in staging.

        Raises OSError when another store uses the volume in a way that excludes this one.
        """
        for folder in (self._data_dir, self._objects, self._derived):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not self._take_lock(self._data_dir / "lock", exclusive=not self._shared):
            raise OSError(f"another adapter store uses {self._data_dir}")
        self.instance_dir = self._data_dir if not self._shared else self._take_instance()
        self.staging = self.instance_dir / "staging"
        self.staging.mkdir(mode=0o700, exist_ok=True)
        for leftover in self.staging.iterdir():
            _remove(leftover)

    def close(self) -> None:
        for file in self._locks:
            file.close()
        self._locks.clear()

    def stage(self) -> StagedAdapter:
        with disk_errors():
            return StagedAdapter(self.staging / secrets.token_hex(16), self._limits)

    def begin_publish(self) -> FileIO | None:
        """A file to close afterwards; until then no store on the volume sweeps. None while one does. Does not block."""
        return try_lock(self._data_dir / "sweep.lock", exclusive=False)

    def begin_sweep(self) -> FileIO | None:
        """A file to close afterwards; until then no store on the volume publishes. None while one does."""
        return try_lock(self._data_dir / "sweep.lock", exclusive=True)

    def publish(self, staged: StagedAdapter, digest: str, *, damaged: bool = False) -> None:
        """Makes a sealed and synced folder the object `digest`, durably. The same object already there stays as it is,
        unless it is `damaged`."""
        with disk_errors():
            for file in staged.directory.iterdir():
                file.chmod(0o400)
            sync_folder(staged.directory)
            if damaged:
                self.delete(digest)
            target = self._path(digest)
            if target.exists():
                staged.discard()
            else:
                staged.directory.rename(target)
                sync_folder(self._objects)
        failpoint("after-rename")

    def delete(self, digest: str) -> None:
        """Removes an object: at once by name, then its bytes. Open readers keep theirs. Missing is fine."""
        for path in (self._path(digest), self._derived / digest):
            doomed = self.staging / secrets.token_hex(16)
            try:
                path.rename(doomed)
            except FileNotFoundError:
                continue
            sync_folder(path.parent)
            shutil.rmtree(doomed)

    def open(self, digest: str, name: str) -> FileIO:
        """A file of an object. Raises OSError when it is missing."""
        return open_existing(self._path(digest) / name)

    def object_dir(self, digest: str) -> Path:
        return self._path(digest)

    def put_derived(self, made: Path, target: Path) -> None:
        """Moves a folder made in staging to its place, unless one is there."""
        sync_folder(made)
        if not target.exists():
            made.rename(target)

    def drop_derived(self, digest: str) -> None:
        """Removes what was made of an object; it is made again when it is asked for."""
        self.remove(self.derived_dir(digest))

    def remove(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)

    @property
    def reserve_bytes(self) -> int:
        return self._limits.reserve_bytes

    def derived_dir(self, digest: str) -> Path:
        """A folder for what is made of an object; goes with it."""
        if not is_digest(digest):
            raise ValueError("not a digest")
        folder = self._derived / digest
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder

    def disk_usage(self) -> tuple[int, int]:
        """(total, free) bytes of the disk."""
        usage = shutil.disk_usage(self._data_dir)
        return usage.total, usage.free

    def _take_lock(self, path: Path, *, exclusive: bool) -> bool:
        file = try_lock(path, exclusive=exclusive)
        if file is not None:
            self._locks.append(file)
        return file is not None

    def _take_instance(self) -> Path:
        """The first folder that no living process has."""
        for number in range(MAX_INSTANCES):
            folder = self._data_dir / "instances" / str(number)
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self._take_lock(folder / "lock", exclusive=True):
                return folder
        raise OSError(f"{MAX_INSTANCES} adapter stores use {self._data_dir}")

    def _path(self, digest: str) -> Path:
        if not is_digest(digest):
            raise ValueError("not a digest")
        return self._objects / digest


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
