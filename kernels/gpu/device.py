"""Functions that several Triton kernels call."""

import triton
import triton.language as tl


@triton.jit
def find_run(starts, num_runs, tile, BLOCK: tl.constexpr):
    """(run, first row, end of the run) of a tile; the tile has rows when first row < end.

    Runs of rows (segments, sequences) are cut into tiles of BLOCK rows that never cross from one run into the next.
    Run s has the tiles from starts[s] // BLOCK + s on: that grows by at least the tiles of a run, so that
    num_rows // BLOCK + num_runs programs are enough, whatever the lengths are.
    """
    low = 0
    high = num_runs
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(starts + middle) // BLOCK + middle <= tile:
            low = middle
        else:
            high = middle
    start = tl.load(starts + low)
    end = tl.load(starts + low + 1)
    return low, start + (tile - low - start // BLOCK) * BLOCK, end


@triton.jit
def load_rows(
    pool, pages, page_stride, page_units, start_unit, row_units, rows, num_rows, first_unit, features,
    UNIT: tl.constexpr, UNITS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`[ROWS, UNITS * UNIT]` of a packed adapter: UNITS units of each of `rows`, zero beside them.

    pool: element pointer. pages: the adapter's page table. UNIT: elements in 128 bytes. A unit never crosses a page,
    so one lookup serves all its elements. page_stride: units.
    """
    units = first_unit + tl.arange(0, UNITS)
    unit = start_unit + rows[:, None] * row_units + units[None, :]
    live = (rows < num_rows)[:, None] & (units < row_units)[None, :]
    page = tl.load(pages + unit // page_units, mask=live, other=0)
    base = (page.to(tl.int64) * page_stride + unit % page_units) * UNIT
    element = tl.arange(0, UNIT)
    column = units[:, None] * UNIT + element[None, :]
    mask = live[:, :, None] & (column < features)[None, :, :]
    tile = tl.load(pool + base[:, :, None] + element[None, None, :], mask=mask, other=0.0)
    return tl.reshape(tile, (ROWS, UNITS * UNIT))


@triton.jit
def narrow_dot(left, right, total):
    """left `[M, K]` @ right `[K, N]` + total, every product exact in float32; 16-bit of one kind as they are."""
    if left.dtype == right.dtype:
        return tl.dot(left, right, total, input_precision="ieee")
    return tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision="ieee")


@triton.jit
def wide_dot(left, right, total):
    """left `[M, K]` float32 @ right `[K, N]` + total in float32.

    A float32 is three bfloat16 one behind the other (8 bits each), so three products on the tensor cores are as good
    as one in float32 when `right` is bfloat16.
    """
    if right.dtype == tl.bfloat16:
        high = left.to(tl.bfloat16)
        rest = left - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        total = tl.dot(low, right, total)
        total = tl.dot(middle, right, total)
        return tl.dot(high, right, total)
    return tl.dot(left, right.to(tl.float32), total, input_precision="ieee")
