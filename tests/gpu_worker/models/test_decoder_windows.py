"""Sliding windows: which layers have one, and exactly how far it reaches."""

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoConfig

from gpu_worker.models import Decoder, load_model
from tests.gpu_worker.models.checkpoints import VARIANTS, WINDOW, WINDOWED, random_model, save
from tests.gpu_worker.models.parity import assert_equal, assert_noticed


def with_windows(decoder: Decoder, windows: tuple[int, ...]) -> Decoder:
    return Decoder(replace(decoder.config, sliding_windows=windows), decoder.weights)


@pytest.mark.parametrize(
    ("variant", "windows"),
    {
        "llama": (0, 0, 0),
        "mistral": (WINDOW, WINDOW, WINDOW),
        "mistral-no-window": (0, 0, 0),
        "mistral-layer-types": (WINDOW, 0, WINDOW),
        "qwen2": (0, WINDOW, WINDOW),
        "qwen2-unused-window-tied": (0, 0, 0),
        "qwen2-layer-types": (WINDOW, 0, WINDOW),
        "qwen3": (0, 0, 0),
        "qwen3-biases-window": (0, 0, WINDOW),
    }.items(),
)
def test_each_layer_has_its_window(variant: str, windows: tuple[int, ...], tmp_path: Path) -> None:
    assert load_model(save(random_model(variant), tmp_path), "float32", "cpu").config.sliding_windows == windows


@pytest.mark.parametrize("difference", [-1, 1])
@pytest.mark.parametrize("variant", WINDOWED)
def test_a_window_off_by_one_is_noticed(variant: str, difference: int, tmp_path: Path) -> None:
    model = random_model(variant)
    decoder = load_model(save(model, tmp_path), "float32", "cpu")
    windows = tuple(window + difference if window else 0 for window in decoder.config.sliding_windows)
    assert_noticed(with_windows(decoder, windows), model)


@pytest.mark.parametrize("variant", ["mistral-layer-types", "qwen2", "qwen2-layer-types"])
def test_a_window_in_the_wrong_layer_is_noticed(variant: str, tmp_path: Path) -> None:
    model = random_model(variant)
    decoder = load_model(save(model, tmp_path), "float32", "cpu")
    windows = decoder.config.sliding_windows
    assert_noticed(with_windows(decoder, (*windows[1:], windows[0])), model)


@pytest.mark.parametrize("window", [1, 33, 34])
def test_the_smallest_window_and_those_as_long_as_the_context(window: int, tmp_path: Path) -> None:
    model = random_model("mistral", sliding_window=window)
    assert_equal(load_model(save(model, tmp_path), "float32", "cpu"), model, "chunks-of-5")


def test_transformers_too_takes_mistral_with_layer_types_for_a_model_of_both_kinds(tmp_path: Path) -> None:
    save(random_model("mistral-layer-types"), tmp_path)
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert (theirs.model_type, theirs.layer_types) == (
        "ministral",
        VARIANTS["mistral-layer-types"][1]["layer_types"],
    )
