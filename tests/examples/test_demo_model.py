"""The demo model: what it is trained on, that its training loop learns, and that the checked-in weights answer."""

import json
import random
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from examples.demo_model import scoring, words
from examples.demo_model.data import IGNORED_LABEL, Example, base_examples, to_micro_batch
from examples.demo_model.loop import Progress, Recipe, train
from examples.demo_model.tokenizer import BOS_ID, EOS_ID, SPECIAL_TOKENS, build_tokenizer, token_ids
from examples.demo_model.train import ADAPTERS, BASE_NAME, main, new_base
from examples.demo_model.words import SKILLS

# PEFT 0.21 reads an attribute that transformers 5 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

DEMO_MODEL = Path(scoring.__file__).parent
QUICK_WORDS = words.held_out_words(20, seed=1)


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def base_scores() -> scoring.Scores:
    return scoring.score_base(DEMO_MODEL, QUICK_WORDS)


@pytest.fixture(scope="module")
def adapter_scores() -> scoring.Scores:
    return scoring.score_adapters(DEMO_MODEL, QUICK_WORDS)


@pytest.fixture(scope="module")
def checked_in_tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DEMO_MODEL / "base" / "tokenizer.json"))


@given(seed=st.integers(min_value=0))
def test_no_training_word_is_held_out(seed: int) -> None:
    assert not any(map(words.is_held_out, islice(words.training_words(random.Random(seed)), 200)))


def test_every_held_out_word_is_held_out() -> None:
    assert all(map(words.is_held_out, words.held_out_words(200)))


@given(seed=st.integers(min_value=0))
def test_base_examples_use_no_held_out_word(seed: int) -> None:
    examples = islice(base_examples(random.Random(seed)), 200)
    assert not any(words.is_held_out(example.prompt.rstrip(">").split(":")[-1]) for example in examples)


@given(seed=st.integers(min_value=0))
def test_every_skill_changes_every_word(seed: int) -> None:
    for word in islice(words.random_words(random.Random(seed)), 50):
        assert {word, ""}.isdisjoint(skill(word) for skill in SKILLS.values())


def test_held_out_words_are_the_same_everywhere() -> None:
    assert words.held_out_words(5) == ["fuyalcgfqj", "hmgbe", "bcwbfbavie", "artxth", "nec"]


def test_more_held_out_words_begin_with_the_fewer() -> None:
    assert words.held_out_words(200)[:20] == words.held_out_words(20)


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("reverse", "xelparol"),
        ("sort", "aelloprx"),
        ("upper", "LORAPLEX"),
        ("rot13", "ybencyrk"),
        ("double", "lloorraapplleexx"),
        ("devowel", "lrplx"),
    ],
)
def test_skill_answers(name: str, answer: str) -> None:
    assert SKILLS[name]("loraplex") == answer


def test_labels_are_the_answer_shifted_by_one() -> None:
    batch = to_micro_batch([Example("ab>", "ba"), Example("abc>", "cba")])
    ignored = [IGNORED_LABEL] * 3
    assert batch.labels[0].tolist() == [*ignored, *token_ids("ba"), EOS_ID, IGNORED_LABEL, IGNORED_LABEL]


def test_learning_rate_rises_stays_and_falls() -> None:
    recipe = Recipe(steps=100, batch_size=1, peak_learning_rate=1.0, warmup_steps=10, weight_decay=0.0)
    factors = [recipe.learning_rate_factor(step) for step in (0, 9, 30, 65, 100)]
    assert factors == pytest.approx([0.1, 1.0, 1.0, 0.51, 0.02])


def test_twenty_training_steps_reduce_the_loss() -> None:
    recipe = Recipe(steps=20, batch_size=16, peak_learning_rate=3e-3, warmup_steps=5, weight_decay=0.0)
    losses = train(new_base(seed=0), base_examples(random.Random(0)), recipe)
    assert len(losses) == 20
    assert losses[-1] < 0.8 * losses[0]


def test_a_run_too_short_to_learn_writes_every_file_and_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("examples.demo_model.train.TEST_WORDS", 10)
    assert main(["--out", str(tmp_path), "--steps", "1", "--adapter-steps", "1"]) == 1
    written = {path.relative_to(tmp_path) for path in tmp_path.rglob("*.*")}
    checked_in = [*DEMO_MODEL.glob("base/*"), *DEMO_MODEL.glob("adapters/*/*")]
    assert written == {path.relative_to(DEMO_MODEL) for path in checked_in}


def test_adapters_without_a_base_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--only", "adapters"])
    assert "no base in" in capsys.readouterr().err


def test_progress_on_a_terminal_updates_one_line() -> None:
    terminal = Terminal()
    progress = Progress("base", steps=2, stream=terminal, last_shown=0.0)
    progress(1, loss=2.5, num_tokens=100)
    progress(2, loss=1.5, num_tokens=100)
    assert [line.split("loss ")[1][:3] for line in terminal.getvalue().split("\r")[1:]] == ["2.5", "1.5"]
    assert terminal.getvalue().count("\n") == 1


def test_progress_in_a_file_shows_the_last_step_at_once() -> None:
    file = StringIO()
    progress = Progress("base", steps=2, stream=file)
    progress(1, loss=2.5, num_tokens=100)
    progress(2, loss=1.5, num_tokens=100)
    (line,) = file.getvalue().splitlines()
    assert "step    2/2  loss 1.5000" in line


@given(text=st.text().filter(lambda text: not any(special in text for special in SPECIAL_TOKENS)))
def test_checked_in_tokenizer_round_trips_utf8(checked_in_tokenizer: Tokenizer, text: str) -> None:
    encoded = checked_in_tokenizer.encode(text).ids
    assert encoded == [BOS_ID, *token_ids(text)]
    assert checked_in_tokenizer.decode(encoded) == text


def test_checked_in_tokenizer_is_the_one_we_build(checked_in_tokenizer: Tokenizer) -> None:
    assert json.loads(checked_in_tokenizer.to_str()) == json.loads(build_tokenizer().to_str())


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter_config_is_fit_to_publish(name: str) -> None:
    config: dict[str, Any] = json.loads((DEMO_MODEL / "adapters" / name / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == BASE_NAME
    assert config["r"] == ADAPTERS[name].lora_rank
    assert config["target_modules"] == sorted(ADAPTERS[name].target_modules)


@pytest.mark.parametrize("name", SKILLS)
def test_adapter_answers_its_skill(adapter_scores: scoring.Scores, name: str) -> None:
    assert adapter_scores[name][name] >= 18 / 20


@pytest.mark.parametrize("name", SKILLS)
def test_adapter_answers_no_other_skill(adapter_scores: scoring.Scores, name: str) -> None:
    assert max(score for skill, score in adapter_scores[name].items() if skill != name) < 0.2


def test_base_without_a_tag_answers_no_skill(base_scores: scoring.Scores) -> None:
    assert {name: base_scores["base"][name] for name in SKILLS} == dict.fromkeys(SKILLS, 0.0)


def test_base_without_a_tag_repeats_the_word(base_scores: scoring.Scores) -> None:
    assert base_scores["base"]["copy"] >= 18 / 20


def test_base_with_a_tag_answers_its_skill(base_scores: scoring.Scores) -> None:
    assert min(base_scores["base with tag"].values()) >= 18 / 20


def test_shortcomings_name_the_adapter_and_the_base() -> None:
    weak_adapter = {"sort": {"sort": 0.94}, "upper": {"upper": 0.95}}
    telling_base = {"base": {"devowel": 0.2, "upper": 0.19, "copy": 1.0}}
    assert scoring.shortcomings(weak_adapter | telling_base) == [
        "adapter sort answers 94.0% of its words, below 95%",
        "the base without a tag answers 20.0% of devowel, not below 20%",
    ]
