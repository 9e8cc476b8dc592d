"""Every kind of rope in every family, on sequences that grow past the length before scaling."""

from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest

from gpu_worker.models import Decoder, load_model
from tests.gpu_worker.models.checkpoints import (
    FAMILIES,
    ORIGINAL,
    ROPE_KINDS,
    YARN_ROPE,
    draw_tokens,
    float32_relative,
    random_model,
    save,
    whole_logits,
)
from tests.gpu_worker.models.parity import (
    SCHEDULES,
    all_oracle_logits,
    assert_equal,
    assert_noticed,
    decode,
    error,
    running,
)
from tests.gpu_worker.models.stepper import Running

KINDS = [kind for kind in ROPE_KINDS if kind != "default"]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family: str, kind: str, schedule: str, tmp_path: Path) -> None:
    model = random_model(family, **ROPE_KINDS[kind])
    assert_equal(load_model(save(model, tmp_path), "float32", "cpu"), model, schedule)


@pytest.mark.parametrize(
    "options",
    [
        {"attention_factor": 0.7},
        {"mscale": 1.4, "mscale_all_dim": 0.6},
        {"truncate": False},
        {"beta_fast": None, "beta_slow": None},
    ],
    ids="-".join,
)
def test_yarn_options(options: dict[str, object], tmp_path: Path) -> None:
    model = random_model(rope_parameters=YARN_ROPE | options)
    decoder = load_model(save(model, tmp_path), "float32", "cpu")
    assert_equal(decoder, model, "chunks-of-5")
    assert_noticed(decoder, random_model(**ROPE_KINDS["yarn"]))


@pytest.mark.parametrize(("kind", "mistaken"), list(permutations(ROPE_KINDS, 2)))
def test_a_wrong_rope_kind_is_noticed(kind: str, mistaken: str, tmp_path: Path) -> None:
    decoder = load_model(save(random_model(**ROPE_KINDS[mistaken]), tmp_path), "float32", "cpu")
    assert_noticed(decoder, random_model(**ROPE_KINDS[kind]))


def test_a_wrong_theta_is_noticed(tmp_path: Path) -> None:
    model = random_model()
    decoder = load_model(save(model, tmp_path), "float32", "cpu")
    rope = replace(decoder.config.rope, theta=2 * decoder.config.rope.theta)
    assert_noticed(Decoder(replace(decoder.config, rope=rope), decoder.weights), model)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_dynamic_up_to_the_original_length_equals_a_whole_prompt(schedule: str, tmp_path: Path) -> None:
    model = random_model(**ROPE_KINDS["dynamic"])
    decoder = load_model(save(model, tmp_path), "float32", "cpu")
    sequence = Running(draw_tokens(ORIGINAL, 3))
    decode(decoder, [sequence], schedule)
    assert error(sequence.logits, [whole_logits(model, sequence.tokens)]) <= float32_relative(model)


def test_dynamic_beyond_it_transformers_depends_on_the_feeding() -> None:
    """Why a whole prompt is not the oracle there."""
    model = random_model(**ROPE_KINDS["dynamic"])
    whole = [whole_logits(model, sequence.tokens) for sequence in running()]
    assert error(whole, all_oracle_logits(model)) > 1000 * float32_relative(model)
