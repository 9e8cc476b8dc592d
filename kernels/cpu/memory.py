"""What the C library is asked for: the results of every step come from its allocator."""

import ctypes

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
