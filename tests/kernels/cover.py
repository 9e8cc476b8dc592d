"""A kernel that says which rows the tiles of `find_run` hold."""

import triton
import triton.language as tl

from kernels.gpu.device import find_run


@triton.jit
def cover_kernel(starts, num_runs, owners, visits, BLOCK: tl.constexpr):
    """One row after another: BLOCK need not be a power of two."""
    run, first, end = find_run(starts, num_runs, tl.program_id(0), BLOCK)
    for row in range(first, tl.minimum(first + BLOCK, end)):
        tl.store(owners + row, run)
        tl.store(visits + row, tl.load(visits + row) + 1)
