"""Batches of several PEFT adapters and base rows against peft, one sequence and one adapter at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from common.packing import MODULE_INDEX, MODULES
from gpu_worker.models import Decoder, load_model
from kernels.adapters import AdapterTables
from tests.gpu_worker.models.checkpoints import draw_tokens, oracle_logits, random_llama, save
from tests.gpu_worker.models.stepper import Running, Stepper
from tests.kernels.adapter_pool import Adapter, LoraWeights, build_tables

# peft 0.21 asks transformers 5.23 for an attribute under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

# (lora_rank, alpha, targets, layers or all, dtype the adapter is stored in)
ADAPTERS: list[tuple[int, int, list[str], list[int] | None, str]] = [
    (1, 2, ["q_proj", "v_proj"], None, "float32"),
    (3, 3, list(MODULES), None, "bfloat16"),
    (8, 16, ["o_proj", "gate_proj", "down_proj"], [1, 2], "float16"),
    (16, 8, ["k_proj", "up_proj"], [0], "float32"),
    (8, 4, list(MODULES), None, "float32"),
]
STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# As in test_decoder.py; the way through A and B is longer than the way past them by the rank, at most 16, in each of
# four projections a layer.
FLOAT32_RELATIVE = (900 + 3 * 4 * 16) * torch.finfo(torch.float32).eps


@dataclass(frozen=True, slots=True)
class Bench:
    """A base model, adapters on it in peft, and the same two in the product's form."""

    oracle: Any
    decoder: Decoder
    tables: AdapterTables

    def wanted(self, sequence: Running) -> Tensor:
        if sequence.adapter < 0:
            with self.oracle.disable_adapter():
                return oracle_logits(self.oracle, sequence.tokens)
        self.oracle.set_adapter(f"adapter-{sequence.adapter}")
        return oracle_logits(self.oracle, sequence.tokens)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    model = random_llama()
    decoder = load_model(save(model, tmp_path_factory.mktemp("base")), "float32", "cpu")
    torch.manual_seed(12)
    oracle: Any = None
    for index, (lora_rank, alpha, targets, layers, _) in enumerate(ADAPTERS):
        config = LoraConfig(
            r=lora_rank,
            lora_alpha=alpha,
            target_modules=targets,
            layers_to_transform=layers,
            init_lora_weights=False,
            lora_dropout=0.0,
        )
        if oracle is None:
            oracle = get_peft_model(model, config, adapter_name=f"adapter-{index}")
        else:
            oracle.add_adapter(f"adapter-{index}", config)
    adapters = [take_adapter(oracle, index) for index in range(len(ADAPTERS))]
    generator = torch.Generator().manual_seed(13)
    return Bench(oracle.eval(), decoder, build_tables(adapters, 3, 4096, generator))


def take_adapter(oracle: Any, index: int) -> Adapter:
    """Reads an adapter out of peft, after rounding peft's own copy as the stored one is."""
    name, dtype = f"adapter-{index}", ADAPTERS[index][4]
    modules = {}
    for path, layer in oracle.named_modules():
        if name in getattr(layer, "lora_A", {}):
            pair = [getattr(layer, part)[name].weight for part in ("lora_A", "lora_B")]
            stored = [weight.data.to(STORED[dtype]) for weight in pair]
            for weight, rounded in zip(pair, stored, strict=True):
                weight.data = rounded.to(weight.dtype)
            parts = path.split(".")
            place = int(parts[parts.index("layers") + 1]), MODULE_INDEX[parts[-1]]
            modules[place] = LoraWeights(stored[0], stored[1], layer.scaling[name])
    return Adapter(dtype, modules)


def mixed_batch() -> list[Running]:
    """Every adapter and the base; adapter 4 and the base have two sequences each."""
    adapters = [-1, 0, 1, 2, 3, 4, 4, -1]
    return [Running(draw_tokens(5 + 3 * seed, seed), adapter) for seed, adapter in enumerate(adapters)]


def assert_equals_peft(bench: Bench, tables: AdapterTables | None, chunk_tokens: int) -> None:
    sequences = mixed_batch()
    Stepper(bench.decoder, sequences, tables).run(chunk_tokens)
    for sequence in sequences:
        wanted = bench.wanted(sequence)
        difference = float((torch.cat(sequence.logits) - wanted).abs().max())
        assert difference <= FLOAT32_RELATIVE * float(wanted.abs().max()), f"adapter {sequence.adapter}"


@pytest.mark.parametrize("chunk_tokens", [33, 5, 1], ids=["whole", "chunks-of-5", "decode"])
def test_every_row_equals_peft(bench: Bench, chunk_tokens: int) -> None:
    assert_equals_peft(bench, bench.tables, chunk_tokens)


def test_every_adapter_changes_every_sequence(bench: Bench) -> None:
    tokens = draw_tokens(9, 3)
    rows = [bench.wanted(Running(tokens, adapter)) for adapter in range(-1, len(ADAPTERS))]
    for index, one in enumerate(rows):
        for other in rows[:index]:
            assert float((one - other).abs().max()) > 1000 * FLOAT32_RELATIVE * float(other.abs().max())


def test_base_rows_do_not_feel_their_neighbours(bench: Bench) -> None:
    tokens = draw_tokens(9, 3)
    alone, beside = Running(tokens), Running(tokens)
    Stepper(bench.decoder, [alone]).run(33)
    Stepper(bench.decoder, [beside, Running(draw_tokens(7, 4), 1)], bench.tables).run(33)
    difference = float((torch.cat(alone.logits) - torch.cat(beside.logits)).abs().max())
    assert difference <= FLOAT32_RELATIVE * float(alone.logits[0].abs().max())


@contextmanager
def expect_a_mismatch() -> Iterator[None]:
    with pytest.raises(AssertionError, match=r"adapter [0-4]"):
        yield


def test_ignored_scaling_is_noticed(bench: Bench) -> None:
    with expect_a_mismatch():
        assert_equals_peft(bench, replace(bench.tables, scaling=torch.ones_like(bench.tables.scaling)), 33)


def test_swapped_adapters_are_noticed(bench: Bench) -> None:
    swapped = {
        name: getattr(bench.tables, name)[[0, 1, 2, 4, 3]]
        for name in ("page_table", "start_unit", "lora_rank", "scaling", "dtype")
    }
    with expect_a_mismatch():
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
def test_bfloat16_is_as_good_as_peft(lora_dtype: str, tmp_path: Path) -> None:
    """The error against float32 logits of the same weights is at most twice that of peft's bfloat16 run."""
    model = random_llama().bfloat16()
    decoder = load_model(save(model, tmp_path), "auto", "cpu")
    torch.manual_seed(14)
    config = LoraConfig(r=8, lora_alpha=4, target_modules=list(MODULES), init_lora_weights=False)
    oracle = get_peft_model(model, config, adapter_name="adapter-4", autocast_adapter_dtype=lora_dtype == "float32")
    oracle.eval()
    adapter = replace(take_adapter(oracle, 4), dtype=lora_dtype)
    stored = {
        place: replace(lora, a=lora.a.to(STORED[lora_dtype]), b=lora.b.to(STORED[lora_dtype]))
        for place, lora in adapter.modules.items()
    }
    tables = build_tables([replace(adapter, modules=stored)], 3, 4096, torch.Generator().manual_seed(15))
    sequence = Running(draw_tokens(33, 1), 0)
    Stepper(decoder, [sequence], tables).run(5)
    theirs = oracle_logits(oracle, sequence.tokens)
    exact = oracle_logits(oracle.float(), sequence.tokens)
    assert rms(torch.cat(sequence.logits) - exact) <= 2 * rms(theirs - exact)


def rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())
