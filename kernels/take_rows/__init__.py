"""take_rows: rows of a matrix, chosen by number."""

from torch import Tensor

from kernels import dispatch
from kernels.linear import Weight
from kernels.take_rows import cpu
from kernels.take_rows.reference import take_rows_reference


def take_rows(source: Weight, rows: Tensor) -> Tensor:
    """`[len(rows), width]`, a copy of `source [num_rows, width]` at rows `[len(rows)]` int64.

    Every row must be there: the reference raises IndexError or RuntimeError, the compiled kernel gives a row of NaN.
    On a GPU it is torch's, which is as fast as the memory.
    """
    if not rows.is_cpu:
        return take_rows_reference(source, rows)
    if dispatch.use_cpu("take_rows", cpu.supports(source, rows)):
        return cpu.take_rows_cpu(source, rows)
    return take_rows_reference(source, rows)
