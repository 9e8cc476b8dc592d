"""What the C library and the operating system are asked for where kernels stream through memory."""

import ctypes
import mmap

from torch import Tensor

# malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# The largest that glibc takes; the results of a step are smaller.
_LARGEST_BLOCK = 32 << 20
_KEPT = (1 << 31) - 1


def keep_freed_memory() -> bool:
    """What the results of a step have freed is there for the next step, instead of going back to the system, which
    clears it page by page when it is asked for again. False where the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_MMAP_THRESHOLD, _LARGEST_BLOCK) and mallopt(_TRIM_THRESHOLD, _KEPT))


def prefer_huge_pages(tensor: Tensor) -> bool:
    """Asks for pages of 2 MiB behind a tensor that nobody has written to yet: a virtual machine walks two tables for
    each page that its cache of addresses has lost. False where it is not on the CPU or the system has none."""
    if not tensor.is_cpu or not hasattr(mmap, "MADV_HUGEPAGE"):
        return False
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return length > 0 and madvise(first, length, mmap.MADV_HUGEPAGE) == 0
