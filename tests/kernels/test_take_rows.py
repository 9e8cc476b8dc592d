import pytest
import torch

from kernels import dispatch
from kernels.linear import Weight, pack
from kernels.take_rows import take_rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def some_rows(num_rows: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """The first and the last one among them, and some twice."""
    rows = torch.randint(num_rows, (count,), generator=generator)
    rows[::3], rows[1::3] = num_rows - 1, 0
    return rows


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("is_packed", [False, True], ids=["matrix", "panels"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 63, 700], ids=lambda size: f"width-{size}")
@pytest.mark.parametrize("num_rows", [1, 16, 37], ids=lambda size: f"of-{size}")
@pytest.mark.parametrize("count", [0, 1, 7, 200], ids=lambda count: f"{count}-rows")
def test_takes_the_bits_of_rows(
    count: int, num_rows: int, width: int, dtype: torch.dtype, is_packed: bool, generator: torch.Generator
) -> None:
    source = torch.randn(num_rows, width, generator=generator).to(dtype)
    source[0, 0] = torch.nan
    rows = some_rows(num_rows, count, generator)
    wanted = source[rows]
    taken = take_rows(pack(source.clone()) if is_packed else source, rows)
    assert taken.dtype == dtype
    assert torch.equal(taken.view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize("is_packed", [False, True], ids=["matrix", "panels"])
@pytest.mark.parametrize("row", [-1, 37, 2**40], ids=lambda row: f"row-{row}")
def test_a_row_that_is_not_there_is_nan_and_no_other_is(row: int, is_packed: bool, generator: torch.Generator) -> None:
    source = torch.randn(37, 20, generator=generator)
    weight: Weight = pack(source.clone()) if is_packed else source
    with dispatch.force("cpu"):
        taken = take_rows(weight, torch.tensor([3, row, 36]))
    assert taken[1].isnan().all()
    assert torch.equal(taken[::2], source[[3, 36]])


def test_indices_of_another_width_are_not_read_as_if_they_were_right() -> None:
    source, rows = torch.ones(4, 8), torch.tensor([1, 2], dtype=torch.int32)
    with dispatch.force("cpu"), pytest.raises(RuntimeError, match="does not take these tensors"):
        take_rows(source, rows)
    assert take_rows(source, rows).shape == (2, 8)


def test_another_row_is_noticed(generator: torch.Generator) -> None:
    source = torch.randn(37, 20, generator=generator)
    assert not torch.equal(take_rows(source, torch.tensor([3, 4])), source[[3, 5]])
