"""Files that nobody else can have made, and the disk's own failures in the caller's terms."""

import errno
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
