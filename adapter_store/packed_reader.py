"""Reads one packed string from a mapping of its file, and knows whether the bytes are those once written."""

import mmap
from io import FileIO
from pathlib import Path

from adapter_store.disk import open_existing
from adapter_store.packed import layout_name, packed_name, parse_layout
from adapter_store.registry import Version
from common.checksum import Checksum
from common.errors import DataLoss
from loraplex.v1 import types_pb2

_AHEAD_BYTES = 4 * 1024 * 1024


def damaged(version: Version) -> DataLoss:
    return DataLoss("ADAPTER_DAMAGED", f"the stored bytes of adapter version {version.digest} are damaged")


class PackedReader:
    """An open packed string; stays readable when the adapter is deleted meanwhile."""

    def __init__(self, layout: types_pb2.PackedLayout, file: FileIO) -> None:
        self.layout = layout
        self._file = file
        self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._checksum = Checksum(layout)

    @classmethod
    def open(cls, directory: Path, version: Version, dtype: str) -> "PackedReader":
        """Raises DataLoss when a file of the folder is missing or cut."""
        try:
            with open_existing(directory / layout_name(dtype)) as file:
                layout = parse_layout(file.read())
            packed = open_existing(directory / packed_name(dtype))
        except (OSError, ValueError) as error:
            raise damaged(version) from error
        if packed.seek(0, 2) != layout.total_bytes:
            packed.close()
            raise damaged(version)
        return cls(layout, packed)

    def read(self, offset_bytes: int, size_bytes: int) -> bytes:
        """A copy of at most `size_bytes` from `offset_bytes` on.

        Asks the disk for what comes after them, and gives back the pages up to there: a large adapter being read takes
        no memory of this process.
        """
        data = self._mapped[offset_bytes : offset_bytes + size_bytes]
        end = (offset_bytes + len(data)) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > 0:
            self._mapped.madvise(mmap.MADV_DONTNEED, 0, end)
        if end < len(self._mapped):
            self._mapped.madvise(mmap.MADV_WILLNEED, end, min(_AHEAD_BYTES, len(self._mapped) - end))
        return data

    def hash(self, offset_bytes: int, data: bytes) -> None:
        """Takes in bytes that were read; those before them are read for it if they were not. Blocks."""
        while (start := self._checksum.num_bytes) < offset_bytes:
            self._checksum.update(self.read(start, min(_AHEAD_BYTES, offset_bytes - start)))
        self._checksum.update(data)

    def is_intact(self) -> bool:
        """Whether all bytes are as they were written. Blocks."""
        self.hash(len(self._mapped), b"")
        return self._checksum.holds()

    def close(self) -> None:
        self._mapped.close()
        self._file.close()
