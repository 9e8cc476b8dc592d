"""Files that nobody else can have made, and the disk's own failures in the caller's terms."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from common.errors import ResourceExhausted

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def create(path: Path) -> FileIO:
    """A new file for writing, readable by its owner only. Raises FileExistsError when anything has that name."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    return FileIO(descriptor, "w")


def open_existing(path: Path) -> FileIO:
    """An existing file for reading. Raises OSError when it is a link."""
    return FileIO(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "r")


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(file: FileIO, data: bytes | memoryview) -> None:
    """Writes every byte; one write of the system may take fewer."""
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[file.write(rest) :]


def try_lock(path: Path, *, exclusive: bool) -> FileIO | None:
    """An open file that holds the lock until it is closed; None while others hold it in another way."""
    file = FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "r+")
    try:
        fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turns a full disk into ResourceExhausted."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        message = "the adapter store's disk is full"
        raise ResourceExhausted("DISK_FULL", message, retry_after_seconds=60.0) from error


def check_room(folder: Path, wanted_bytes: int, reserve_bytes: int) -> None:
    """Raises ResourceExhausted when fewer than `reserve_bytes` would be free after `wanted_bytes` more."""
    disk = os.statvfs(folder)
    free_bytes = disk.f_bavail * disk.f_frsize
    if free_bytes - wanted_bytes < reserve_bytes:
        message = (
            f"the adapter store's disk has {free_bytes} bytes free; "
            f"{wanted_bytes} more would take from the {reserve_bytes} that stay free"
        )
        raise ResourceExhausted("DISK_RESERVE", message, retry_after_seconds=60.0)
