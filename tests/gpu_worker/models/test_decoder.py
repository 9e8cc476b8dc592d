"""The decoder against transformers: the same logits for every token, however the tokens were fed."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from gpu_worker.models import Decoder, load_model
from tests.gpu_worker.models.checkpoints import ROPE_KINDS, VARIANTS, float32_relative, random_model, save
from tests.gpu_worker.models.parity import (
    SCHEDULES,
    all_logits,
    all_oracle_logits,
    assert_equal,
    assert_noticed,
    running,
)
from tests.gpu_worker.models.stepper import Stepper


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant: str, schedule: str, tmp_path: Path) -> None:
    model = random_model(variant)
    assert_equal(load_model(save(model, tmp_path), "float32", "cpu"), model, schedule)


def test_a_sharded_checkpoint(tmp_path: Path) -> None:
    model = random_model()
    save(model, tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_equal(load_model(tmp_path, "float32", "cpu"), model, "whole")


BFLOAT16_CASES = {
    "llama": ("llama", "default"),
    "llama-biases": ("llama-biases", "default"),
    "llama-yarn": ("llama", "yarn"),
    "mistral": ("mistral", "default"),
    "qwen2": ("qwen2", "default"),
    "qwen3": ("qwen3", "default"),
    "qwen3-biases-window": ("qwen3-biases-window", "default"),
}


@pytest.mark.parametrize("schedule", ["whole", "decode"])
@pytest.mark.parametrize(("variant", "kind"), BFLOAT16_CASES.values(), ids=BFLOAT16_CASES)
def test_bfloat16_is_as_good_as_transformers(variant: str, kind: str, schedule: str, tmp_path: Path) -> None:
    """The error against float32 logits of the same weights is at most twice that of transformers' bfloat16 run: both
    round every activation once per operation, in another order."""
    rounded = random_model(variant, **ROPE_KINDS[kind]).bfloat16()
    decoder = load_model(save(rounded, tmp_path), "auto", "cpu")
    assert decoder.dtype == torch.bfloat16
    ours = all_logits(decoder, schedule)
    theirs = all_oracle_logits(rounded)
    exact = all_oracle_logits(rounded.float())
    assert ours[0].dtype == torch.float32
    assert rms(ours, exact) <= 2 * rms(theirs, exact)


def rms(values: list[Tensor], wanted: list[Tensor]) -> float:
    return float((torch.cat(values) - torch.cat(wanted)).square().mean().sqrt())


@pytest.mark.parametrize("norm", ["q_norm", "k_norm"])
def test_a_norm_left_out_is_noticed(norm: str, tmp_path: Path) -> None:
    model = random_model("qwen3")
    decoder = load_model(save(model, tmp_path), "float32", "cpu")
    for layer in decoder.weights.layers:
        getattr(layer, norm).fill_(1.0)
    assert_noticed(decoder, model)


def test_a_bias_left_out_is_noticed(tmp_path: Path) -> None:
    model = random_model("qwen2")
    decoder = load_model(save(model, tmp_path), "float32", "cpu")
    bias = decoder.weights.layers[0].qkv.bias
    assert bias is not None
    bias.zero_()
    assert_noticed(decoder, model)


@pytest.fixture
def decoder(tmp_path: Path) -> Decoder:
    return load_model(save(random_model(), tmp_path), "float32", "cpu")


def test_only_the_wanted_rows_get_logits(decoder: Decoder) -> None:
    stepper = Stepper(decoder, running())
    every = decoder.forward(stepper.batch([1, 7, 33]))
    rows = torch.tensor([40, 0, 7])
    some = decoder.forward(stepper.batch([1, 7, 33], rows))
    tolerance = float32_relative(random_model()) * float(every.abs().max())
    assert float((some - every[rows]).abs().max()) <= tolerance
    assert decoder.forward(stepper.batch([1, 7, 33], rows[:0])).shape == (0, every.shape[1])


def test_tied_embeddings_are_stored_once(tmp_path: Path) -> None:
    decoder = load_model(save(random_model("llama-mha-tied"), tmp_path), "float32", "cpu")
    assert decoder.weights.lm_head is decoder.weights.embedding
