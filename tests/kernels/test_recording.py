"""What is written down runs again for other batches, or is refused."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.cpu.launch import NotRecordableError, settle, written_down
from kernels.cpu.recording import Recording, Take
from kernels.linear import PackedWeight, linear, pack
from kernels.rms_norm import rms_norm
from kernels.silu_and_mul import silu_and_mul
from kernels.take_rows import take_rows

HIDDEN = 48


@pytest.fixture
def weight(generator: torch.Generator) -> PackedWeight:
    return pack(torch.randn(2 * HIDDEN, HIDDEN, generator=generator))


def take(tokens: int, run: Callable[[Tensor], tuple[Tensor, ...]]) -> Take:
    x = torch.empty(tokens, HIDDEN)
    with written_down() as operations:
        results = run(x)
    return Take(operations, (tokens, x.data_ptr()), (0,), results)


def record(run: Callable[[Tensor], tuple[Tensor, ...]]) -> Recording:
    return Recording(take(2, run), take(3, run))


@pytest.mark.parametrize("tokens", [1, 2, 3, 17, 200])
def test_a_recording_gives_the_bits_of_its_operations(
    tokens: int, weight: PackedWeight, generator: torch.Generator
) -> None:
    norm = torch.ones(HIDDEN)

    def layers(x: Tensor) -> tuple[Tensor, Tensor]:
        residual = None
        for _ in range(4):
            normed, residual = rms_norm(x, norm, 1e-5, residual)
            x = silu_and_mul(linear(normed, weight))
        assert residual is not None
        return x, residual

    recording = record(layers)
    x = torch.randn(tokens, HIDDEN, generator=generator)
    (row_bytes,) = recording.row_bytes
    arena = torch.full((tokens * row_bytes,), 0xFF, dtype=torch.uint8)
    assert all(map(torch.equal, recording.run((tokens, x.data_ptr()), [arena]), layers(x)))
    # four layers need no more room than two: normed, gate and up, two of x, two of the residual stream
    assert row_bytes <= 7 * HIDDEN * 4


@pytest.mark.parametrize("num_rows", [0, 1, 5, 40])
def test_results_may_have_another_number_of_rows_than_what_they_are_made_of(
    num_rows: int, weight: PackedWeight, generator: torch.Generator
) -> None:
    def run(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        gated = silu_and_mul(linear(x, weight))
        return gated, silu_and_mul(linear(take_rows(gated, rows), weight))

    def taken(tokens: int, count: int) -> Take:
        x, rows = torch.empty(tokens, HIDDEN), torch.empty(count, dtype=torch.int64)
        with written_down() as operations:
            results = run(x, rows)
        return Take(operations, (count, x.data_ptr(), tokens, rows.data_ptr()), (2, 0), results)

    recording = Recording(taken(2, 5), taken(3, 7))
    x, rows = torch.randn(9, HIDDEN, generator=generator), torch.randint(9, (num_rows,), generator=generator)
    counts = (9, num_rows)
    arenas = [
        torch.full((n * each,), 0xFF, dtype=torch.uint8) for n, each in zip(counts, recording.row_bytes, strict=True)
    ]
    results = recording.run((num_rows, x.data_ptr(), 9, rows.data_ptr()), arenas)
    assert all(map(torch.equal, results, run(x, rows)))


def test_nothing_runs_while_it_is_written_down_and_everything_afterwards() -> None:
    x = torch.ones(2, 16)
    with written_down() as operations:
        silu_and_mul(x)
        silu_and_mul(x)
    assert len(operations) == 2
    assert silu_and_mul(x).isfinite().all()


def test_an_error_while_it_is_written_down_leaves_nothing_behind() -> None:
    x = torch.ones(2, 16)
    with pytest.raises(NotRecordableError), written_down():
        silu_and_mul(silu_and_mul(x)[:, ::2])
    with written_down() as operations:
        silu_and_mul(x)
    assert len(operations) == 1
    assert silu_and_mul(x).isfinite().all()


def reading_between(x: Tensor, weight: PackedWeight) -> tuple[Tensor, ...]:
    out = linear(x, weight)
    settle()
    return (silu_and_mul(out * 2),)


def reference_between(x: Tensor, weight: PackedWeight) -> tuple[Tensor, ...]:
    return (silu_and_mul(linear(x, weight)[:, ::2]),)


def other_constant(x: Tensor, weight: PackedWeight) -> tuple[Tensor, ...]:
    return (rms_norm(x, torch.ones(HIDDEN), len(x) / 10)[0],)


def other_room(x: Tensor, weight: PackedWeight) -> tuple[Tensor, ...]:
    return (linear(torch.empty(len(x) ** 2, HIDDEN), weight),)


def other_operations(x: Tensor, weight: PackedWeight) -> tuple[Tensor, ...]:
    out = linear(x, weight)
    return (out,) if len(x) == 2 else (silu_and_mul(out),)


@pytest.mark.parametrize("run", [reading_between, reference_between, other_constant, other_room, other_operations])
def test_what_is_not_the_same_for_every_batch_is_refused(
    run: Callable[[Tensor, PackedWeight], tuple[Tensor, ...]], weight: PackedWeight
) -> None:
    with pytest.raises(NotRecordableError):
        record(lambda x: run(x, weight))
