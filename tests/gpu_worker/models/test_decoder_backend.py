"""Which kernels a forward pass runs, nothing being forced."""

from pathlib import Path

import pytest

from gpu_worker.models import load_model
from kernels import dispatch
from kernels.linear import PackedWeight
from tests.gpu_worker.models.checkpoints import draw_tokens, random_model, save
from tests.gpu_worker.models.lora_bench import Bench, build_bench
from tests.gpu_worker.models.stepper import Running, Stepper

OPS = {"linear", "lora_expand", "lora_shrink", "paged_attention", "rms_norm", "silu_and_mul", "store_kv", "take_rows"}


def backends_of_a_step(bench: Bench) -> set[tuple[str, str]]:
    before = dispatch.calls.copy()
    Stepper(bench.decoder, [Running(draw_tokens(9, 1), 4), Running(draw_tokens(5, 2))], bench.tables).run(4)
    return set(dispatch.calls - before)


@pytest.mark.parametrize("variant", ["llama", "llama-mqa-head-dim-20", "mistral", "qwen2", "qwen3"])
def test_every_operation_runs_compiled(variant: str, tmp_path: Path) -> None:
    bench = build_bench(variant, tmp_path)
    assert backends_of_a_step(bench) == {(op, "cpu") for op in OPS}
    with dispatch.force("reference"):
        assert backends_of_a_step(bench) == {(op, "reference") for op in OPS}


def test_a_model_that_is_loaded_for_the_references_keeps_its_rows(tmp_path: Path) -> None:
    folder = save(random_model("llama"), tmp_path)
    with dispatch.force("reference"):
        assert not isinstance(load_model(folder, "float32", "cpu").weights.lm_head, PackedWeight)
    assert isinstance(load_model(folder, "float32", "cpu").weights.lm_head, PackedWeight)
