"""Where the bytes of the host tier are: files mapped on a CPU, a pinned arena in front of a GPU. One seam for both."""

from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from common.checksum import Checksum
from common.packing import PackedLayout
from gpu_worker.memory.allocator import OutOfPagesError, PageAllocator, PageKind
from gpu_worker.memory.geometry import PageGeometry
from gpu_worker.memory.pool import PagePool
from kernels.cpu.pages import Watch, copy_hashed


class WrongBytesError(Exception):
    """The bytes cannot be had, or are others than promised; the message says which."""


class HostBlob(Protocol):
    """One adapter's byte string in host memory."""

    num_bytes: int

    def copy_to(self, pool: PagePool, pages: list[int], watch: Watch | None = None) -> None:
        """Fills `pages`, each byte once, and verifies what was copied. Raises WrongBytesError. On a side thread.

        `watch` may say earlier that they are there, but only once nothing touches them any more.
        """

    def close(self) -> None:
        """The bytes may go; nothing copies them any more."""


class HostStorage(Protocol):
    """Takes fetched files in."""

    def bytes_for(self, layout: PackedLayout) -> int:
        """What an adapter takes of the budget."""

    def open(self, path: Path, layout: PackedLayout) -> HostBlob:
        """Quick, and independent of the file's name from here on. Raises WrongBytesError."""


class MappedFiles:
    """On a CPU the file is the host tier: mapped, read by the copy itself, and no copy of its own in memory."""

    def bytes_for(self, layout: PackedLayout) -> int:
        return layout.total_bytes

    def open(self, path: Path, layout: PackedLayout) -> HostBlob:
        return MappedBlob(_mapped(path, layout), layout)


class MappedBlob:
    """A private mapping of a file."""

    def __init__(self, data: npt.NDArray[np.uint8], layout: PackedLayout) -> None:
        self.num_bytes = layout.total_bytes
        self._data = data
        self._layout = layout

    def copy_to(self, pool: PagePool, pages: list[int], watch: Watch | None = None) -> None:
        # Hashed where kernels read them: what is verified is what is used.
        _write_verified(pool, pages, self._data, self._layout, watch)

    def close(self) -> None:
        del self._data


class PinnedArena:
    """A second pool of pages, in memory that a device reads by itself: a load is as many page copies on a stream."""

    def __init__(self, geometry: PageGeometry, limit_bytes: int, *, pinned: bool) -> None:
        num_pages = limit_bytes // geometry.page_bytes
        self._geometry = geometry
        self._allocator = PageAllocator(num_pages)
        self.pool = PagePool(geometry, num_pages, "cpu", pinned=pinned)

    def bytes_for(self, layout: PackedLayout) -> int:
        return self._geometry.pages_for_bytes(layout.total_bytes) * self._geometry.page_bytes

    def open(self, path: Path, layout: PackedLayout) -> HostBlob:
        try:
            pages = self._allocator.allocate(self._geometry.pages_for_bytes(layout.total_bytes), PageKind.ADAPTER)
        except OutOfPagesError as error:
            raise WrongBytesError(f"the host tier has no room: {error}") from None
        try:
            return ArenaBlob(self, _mapped(path, layout), layout, pages)
        except WrongBytesError:
            self.free(pages)
            raise

    def free(self, pages: list[int]) -> None:
        self._allocator.free(pages, self._allocator.completed_step)


class ArenaBlob:
    """Pages of the arena; the first copy fills them from the file."""

    def __init__(self, arena: PinnedArena, data: npt.NDArray[np.uint8], layout: PackedLayout, pages: list[int]) -> None:
        self.num_bytes = layout.total_bytes
        self._arena = arena
        self._file: npt.NDArray[np.uint8] | None = data
        self._layout = layout
        self._pages = pages

    def copy_to(self, pool: PagePool, pages: list[int], watch: Watch | None = None) -> None:
        if self._file is not None:
            # Hashed in the arena: the device reads these bytes and no others, and hashing them there would cost a
            # second way over the bus.
            _write_verified(self._arena.pool, self._pages, self._file, self._layout)
            self._file = None
        pool.copy_pages(pages, self._arena.pool, self._pages)

    def close(self) -> None:
        self._arena.free(self._pages)


def _write_verified(
    pool: PagePool,
    pages: list[int],
    data: npt.NDArray[np.uint8],
    layout: PackedLayout,
    watch: Watch | None = None,
) -> None:
    """Raises WrongBytesError unless `pages` hold what the layout promises.

    One compiled call where there is one: each call is a turn at the interpreter, for which a copying thread stands in
    line behind the step loop.
    """
    digest = None
    if layout.blake3:
        if watch is not None:
            watch.expect(layout.blake3)
        digest = copy_hashed(pool.bytes, pages, torch.from_numpy(data), watch=watch)
    if digest is None:
        checksum = Checksum(layout)
        pool.write(pages, data, checksum.update)
        if checksum.holds():
            return
    elif digest == layout.blake3:
        return
    raise WrongBytesError("the bytes copied do not have the recorded checksum")


def _mapped(path: Path, layout: PackedLayout) -> npt.NDArray[np.uint8]:
    """Copy-on-write, and without a file descriptor that stays open: thousands are mapped. Raises WrongBytesError."""
    try:
        size = path.stat().st_size
        if size != layout.total_bytes:
            raise WrongBytesError(f"the cached bytes are {size} long, the layout says {layout.total_bytes}")
        mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    except (OSError, RuntimeError) as error:
        raise WrongBytesError(f"the cached bytes cannot be read: {error.__class__.__name__}") from None
    data: npt.NDArray[np.uint8] = mapped.numpy()
    return data
