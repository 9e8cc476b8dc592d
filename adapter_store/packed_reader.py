"""Reads the packed string of one version from a mapping of its file."""

import mmap
from io import FileIO

from adapter_store.blobs import Blobs
from adapter_store.packed import layout_name, packed_name, parse_layout
from adapter_store.registry import Version
from common.errors import DataLoss, Unimplemented
from loraplex.v1 import types_pb2

_AHEAD_BYTES = 4 * 1024 * 1024


class PackedReader:
    """An open packed string; stays readable when the adapter is deleted meanwhile."""

    def __init__(self, layout: types_pb2.PackedLayout, file: FileIO) -> None:
        self.layout = layout
        self._file = file
        self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    @classmethod
    def open(cls, blobs: Blobs, version: Version, dtype: str) -> "PackedReader":
        """Raises Unimplemented for a dtype other than the version's, DataLoss when a file is missing or cut."""
        if dtype != version.dtype:
            message = f"the adapter is stored in {version.dtype}; this release does not convert it to {dtype}"
            raise Unimplemented("DTYPE_UNSUPPORTED", message)
        try:
            with blobs.open(version.digest, layout_name(dtype)) as file:
                layout = parse_layout(file.read())
            packed = blobs.open(version.digest, packed_name(dtype))
        except OSError as error:
            raise _damaged(version) from error
        if packed.seek(0, 2) != layout.total_bytes:
            packed.close()
            raise _damaged(version)
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

    def close(self) -> None:
        self._mapped.close()
        self._file.close()


def _damaged(version: Version) -> DataLoss:
    return DataLoss("ADAPTER_DAMAGED", f"the stored bytes of adapter version {version.digest} are damaged")
