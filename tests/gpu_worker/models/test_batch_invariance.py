"""The decoder gives a token the same bits whoever shares its batch, however it is chunked, resumed or threaded."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gpu_worker.models import Decoder, decoder, load_model
from kernels import dispatch
from kernels.adapters import AdapterTables
from kernels.linear import Weight, as_rows, linear
from tests.gpu_worker.models.checkpoints import draw_tokens, random_model, save
from tests.gpu_worker.models.lora_bench import RECIPES, Bench, build_bench
from tests.gpu_worker.models.stepper import Running, Stepper

LENGTH = 60
VARIANTS = ("llama", "qwen3-biases-window")
ADAPTERS = (-1, 4, 6)


@pytest.fixture(autouse=True)
def compiled() -> Iterator[None]:
    with dispatch.force("cpu"):
        yield
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=VARIANTS)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return build_bench(request.param, tmp_path_factory.mktemp("model"))


def logits(
    model: Decoder, tables: AdapterTables | None, adapter: int, lengths: list[int], others: list[Running]
) -> Tensor:
    """`[LENGTH, vocab]` of one sequence fed `lengths[i]` tokens in step i, beside others that take what they can."""
    subject = Running(draw_tokens(LENGTH, 99), adapter)
    stepper = Stepper(model, [subject, *others], tables)
    for length in lengths:
        left = {id(sequence): len(sequence.tokens) - sequence.num_computed for sequence in others}
        stepper.step(
            [length if seq is subject else min(left[id(seq)], max(1, length // 2)) for seq in stepper.sequences]
        )
    return torch.cat(subject.logits)


def crowd() -> list[Running]:
    """63 others, of all adapters and none, 1 to 60 tokens long."""
    return [Running(draw_tokens(1 + seed % LENGTH, seed), seed % (len(RECIPES) + 1) - 1) for seed in range(63)]


SCHEDULES = {"whole": [LENGTH], "chunks-of-16": [16, 16, 16, 12], "token-by-token": [1] * LENGTH}


@pytest.mark.parametrize("threads", [1, 2], ids=["1-thread", "2-threads"])
@pytest.mark.parametrize("company", ["alone", "in-a-batch-of-64"])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: f"adapter-{adapter}")
def test_logits_are_those_of_the_sequence_alone(
    adapter: int, schedule: list[int], company: str, threads: int, bench: Bench
) -> None:
    alone = logits(bench.decoder, bench.tables, adapter, [LENGTH], [])
    torch.set_num_threads(threads)
    others = crowd() if company != "alone" else []
    assert torch.equal(logits(bench.decoder, bench.tables, adapter, schedule, others), alone)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: f"adapter-{adapter}")
def test_a_resume_from_any_position_changes_nothing(adapter: int, bench: Bench) -> None:
    """What was generated becomes one chunk of the prompt, then decoding goes on."""
    alone = logits(bench.decoder, bench.tables, adapter, [LENGTH], [])
    for position in range(1, LENGTH):
        resumed = logits(bench.decoder, bench.tables, adapter, [position, *[1] * min(3, LENGTH - position)], [])
        assert torch.equal(resumed, alone[: len(resumed)])


def test_a_row_without_an_adapter_is_base_only_serving(bench: Bench) -> None:
    base = logits(bench.decoder, None, -1, [LENGTH], [])
    assert torch.equal(logits(bench.decoder, bench.tables, -1, SCHEDULES["chunks-of-16"], crowd()), base)


def test_bfloat16(tmp_path: Path) -> None:
    model = load_model(save(random_model("llama"), tmp_path), "bfloat16", "cpu")
    others = [Running(draw_tokens(LENGTH, seed)) for seed in range(20)]
    alone = logits(model, None, -1, [LENGTH], [])
    assert torch.equal(logits(model, None, -1, SCHEDULES["chunks-of-16"], others), alone)


def test_a_product_that_depends_on_the_number_of_rows_is_noticed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = logits(bench.decoder, bench.tables, 4, [LENGTH], [])

    def splits_when_wide(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        if len(x) <= LENGTH:
            return linear(x, weight, bias)
        rows, half = as_rows(weight), x.shape[1] // 2
        out = x[:, :half] @ rows[:, :half].T + x[:, half:] @ rows[:, half:].T
        return out if bias is None else out + bias

    monkeypatch.setattr(decoder, "linear", splits_when_wide)
    assert not torch.equal(logits(bench.decoder, bench.tables, 4, [LENGTH], crowd()), alone)
