"""Batches of several PEFT adapters and base rows against peft, one sequence and one adapter at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from common.packing import MODULES
from gpu_worker.models import load_model
from kernels.adapters import AdapterTables
from tests.gpu_worker.models.checkpoints import FAMILIES, draw_tokens, oracle_logits, random_model, save
from tests.gpu_worker.models.lora_bench import (
    PATTERNS,
    RECIPES,
    RSLORA,
    Bench,
    Recipe,
    build_bench,
    mixed_batch,
    pack,
    take_adapter,
)
from tests.gpu_worker.models.stepper import Running, Stepper
from tests.kernels.adapter_pool import build_tables

# peft 0.21 asks transformers 5.23 for an attribute under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module", params=FAMILIES)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return build_bench(request.param, tmp_path_factory.mktemp("base"))


def assert_equals_peft(bench: Bench, tables: AdapterTables | None, chunk_tokens: int) -> None:
    sequences = mixed_batch()
    Stepper(bench.decoder, sequences, tables).run(chunk_tokens)
    for sequence in sequences:
        wanted = bench.wanted(sequence)
        difference = float((torch.cat(sequence.logits) - wanted).abs().max())
        assert difference <= bench.float32_relative * float(wanted.abs().max()), f"adapter {sequence.adapter}"


@pytest.mark.parametrize("chunk_tokens", [33, 5, 1], ids=["whole", "chunks-of-5", "decode"])
def test_every_row_equals_peft(bench: Bench, chunk_tokens: int) -> None:
    assert_equals_peft(bench, bench.tables, chunk_tokens)


def test_every_adapter_changes_every_sequence(bench: Bench) -> None:
    tokens = draw_tokens(9, 3)
    rows = [bench.wanted(Running(tokens, adapter)) for adapter in range(-1, len(RECIPES))]
    for index, one in enumerate(rows):
        for other in rows[:index]:
            assert float((one - other).abs().max()) > 1000 * bench.float32_relative * float(other.abs().max())


def test_base_rows_do_not_feel_their_neighbours(bench: Bench) -> None:
    tokens = draw_tokens(9, 3)
    alone, beside = Running(tokens), Running(tokens)
    Stepper(bench.decoder, [alone]).run(33)
    Stepper(bench.decoder, [beside, Running(draw_tokens(7, 4), 1)], bench.tables).run(33)
    difference = float((torch.cat(alone.logits) - torch.cat(beside.logits)).abs().max())
    assert difference <= bench.float32_relative * float(alone.logits[0].abs().max())


@contextmanager
def expect_a_mismatch(adapter: str = "[0-6]") -> Iterator[None]:
    with pytest.raises(AssertionError, match=rf"adapter {adapter}"):
        yield


def test_ignored_scaling_is_noticed(bench: Bench) -> None:
    with expect_a_mismatch():
        assert_equals_peft(bench, replace(bench.tables, scaling=torch.ones_like(bench.tables.scaling)), 33)


@pytest.mark.parametrize(
    ("adapter", "changes"),
    [
        (PATTERNS, {"alpha_pattern": {}}),
        (PATTERNS, {"alpha_pattern": {"v_proj": 20}}),
        (PATTERNS, {"rank_pattern": {}}),
        (RSLORA, {"use_rslora": False}),
        (RSLORA, {"rank_pattern": {}}),
    ],
    ids=["alpha-pattern", "one-of-two-alpha-patterns", "rank-pattern-in-scaling", "rslora", "rslora-of-rank-pattern"],
)
def test_an_ignored_option_is_noticed(bench: Bench, adapter: int, changes: dict[str, Any]) -> None:
    recipes = [replace(recipe, **changes) if row == adapter else recipe for row, recipe in enumerate(RECIPES)]
    with expect_a_mismatch(str(adapter)):
        assert_equals_peft(bench, pack(bench.oracle, recipes), 33)


def test_swapped_adapters_are_noticed(bench: Bench) -> None:
    swapped = {
        name: getattr(bench.tables, name)[[0, 1, 2, 4, 3, 5, 6]]
        for name in ("page_table", "start_unit", "lora_rank", "scaling", "dtype")
    }
    with expect_a_mismatch("[34]"):
        assert_equals_peft(bench, replace(bench.tables, **swapped), 33)


@pytest.mark.parametrize("module", range(len(MODULES)), ids=MODULES)
def test_one_dropped_module_is_noticed(bench: Bench, module: int) -> None:
    lora_rank = bench.tables.lora_rank.clone()
    lora_rank[:, 2, module] = 0
    with expect_a_mismatch():
        assert_equals_peft(bench, replace(bench.tables, lora_rank=lora_rank), 33)


def test_lora_left_out_is_noticed(bench: Bench) -> None:
    with expect_a_mismatch():
        assert_equals_peft(bench, None, 33)


@pytest.mark.parametrize("lora_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_good_as_peft(family: str, lora_dtype: str, tmp_path: Path) -> None:
    """The error against float32 logits of the same weights is at most twice that of peft's bfloat16 run."""
    model = random_model(family).bfloat16()
    decoder = load_model(save(model, tmp_path), "auto", "cpu")
    torch.manual_seed(14)
    recipe = Recipe(8, 4, dtype=lora_dtype)
    autocast = lora_dtype == "float32"
    oracle = get_peft_model(model, recipe.to_peft(), adapter_name="adapter", autocast_adapter_dtype=autocast)
    oracle.eval()
    adapter = take_adapter(oracle, "adapter", recipe)
    tables = build_tables([adapter], 3, 4096, torch.Generator().manual_seed(15))
    sequence = Running(draw_tokens(33, 1), 0)
    Stepper(decoder, [sequence], tables).run(5)
    theirs = oracle_logits(oracle, sequence.tokens)
    exact = oracle_logits(oracle.float(), sequence.tokens)
    assert rms(torch.cat(sequence.logits) - exact) <= 2 * rms(theirs - exact)


def rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())
