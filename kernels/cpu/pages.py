"""Copies a byte string into pages and hashes it where it lies then, in one call that needs no interpreter meanwhile."""

import ctypes
from collections.abc import Sequence
from ctypes import c_int64, c_void_p

from torch import Tensor

from kernels.cpu.library import library, vector_lanes


class Watch(ctypes.Structure):
    """When a copy of the expected bytes has ended, for threads that do not wait for the copying one to say so.

    `ended`: nanoseconds of `time.perf_counter_ns`; 0 until then, and for ever when the bytes are others.
    """

    _fields_ = (("expected", ctypes.c_uint8 * 32), ("ended", c_int64))
    ended: int

    def expect(self, digest: str) -> None:
        """A BLAKE3 in hexadecimal."""
        self.expected[:] = bytes.fromhex(digest)


class _Copy(ctypes.Structure):
    _fields_ = (
        ("pool", c_void_p),
        ("page_bytes", c_int64),
        ("pages", c_void_p),
        ("data", c_void_p),
        ("num_bytes", c_int64),
        ("lanes", c_int64),
        ("watch", c_void_p),
        ("digest", ctypes.c_uint8 * 32),
    )


def copy_hashed(
    pool: Tensor, pages: Sequence[int], data: Tensor, *, lanes: int | None = None, watch: Watch | None = None
) -> str | None:
    """Fills `pages` of `pool`, `[num_pages, page_bytes]` uint8, with `data`, `[num_bytes]` uint8, both on the CPU.

    Returns the BLAKE3 of what the pages hold then, in hexadecimal; None, and nothing is copied, when there is no
    compiled library. The tail of the last page is left as it is. `lanes`: 8 or 16, None = what the CPU has. Raises
    ValueError when the pages are not as many as the bytes need, or not of the pool.
    """
    found = library()
    if found is None:
        return None
    num_pages, page_bytes = pool.shape
    if len(pages) != -(-data.numel() // page_bytes) or not all(0 <= page < num_pages for page in pages):
        raise ValueError(f"{data.numel()} bytes do not go into {len(pages)} pages of {page_bytes} bytes")
    places = (c_int64 * len(pages))(*pages)
    copy = _Copy(
        pool.data_ptr(),
        page_bytes,
        ctypes.addressof(places),
        data.data_ptr(),
        data.numel(),
        lanes or vector_lanes(),
        ctypes.addressof(watch) if watch else None,
    )
    found.loraplex_copy_hashed(ctypes.byref(copy))
    return bytes(copy.digest).hex()
