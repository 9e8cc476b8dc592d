"""The parts of the demo that need no fleet: its words, its judgement of answers, its table."""

from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest

from examples import demo
from examples.demo import TOKENS_PER_STREAM, WORDS, Board, Stream, problems_of, summary
from examples.demo_model.words import SKILLS, copy, is_held_out, reverse, separates_skills
from tests.loraplex.fake_services import write_services


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def stream() -> Stream:
    return Stream("reverse", "reverse", reverse, answers=[reverse(WORDS[0]), reverse(WORDS[1])], tokens=16, seconds=2.0)


@pytest.mark.parametrize("word", WORDS)
def test_a_word_was_never_trained_on_and_tells_the_skills_apart(word: str) -> None:
    assert is_held_out(word)
    assert separates_skills(word)
    assert len({skill(word) for skill in [*SKILLS.values(), copy]}) == len(SKILLS) + 1


@pytest.mark.parametrize("skill", [*SKILLS.values(), copy], ids=lambda skill: skill.__name__)
def test_the_words_are_enough_for_the_tokens_of_a_stream(skill: Callable[[str], str]) -> None:
    end_of_sequence = 1
    assert sum(len(skill(word)) + end_of_sequence for word in WORDS) >= TOKENS_PER_STREAM


def test_right_answers_are_no_mistakes(stream: Stream) -> None:
    assert stream.mistakes() == []


def test_a_wrong_answer_is_a_sentence(stream: Stream) -> None:
    stream.answers[1] = WORDS[1]
    assert stream.mistakes() == [f"reverse answered {WORDS[1]!r} to {WORDS[1]!r}, not {reverse(WORDS[1])!r}"]


def test_a_batch_that_was_not_mixed_is_a_sentence(stream: Stream) -> None:
    assert problems_of([stream], distinct=6) == []
    assert problems_of([stream], distinct=5) == ["at most 5 adapters shared a batch, fewer than 6"]


def test_an_upload_that_fails_fails_the_demo(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With fake services, which say they are ready at an address where nobody answers."""
    monkeypatch.setattr("loraplex.fleet.find_services", lambda: write_services(tmp_path / "services"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert demo.main() == 1
    error = capsys.readouterr().err
    assert "demo failed: UNREACHABLE: nothing answers at 127.0.0.1:1" in error
    assert f"the logs are in {tmp_path}" in error


def test_a_table_that_is_not_on_a_terminal_is_printed_once(stream: Stream) -> None:
    output = StringIO()
    board = Board([stream], output)
    board.changed()
    assert output.getvalue() == ""
    board.finish()
    header, first, second = output.getvalue().splitlines()
    assert header.split() == ["reverse"]
    assert [first.split(), second.split()] == [[word, reverse(word)] for word in WORDS[:2]]


def test_a_table_on_a_terminal_is_drawn_over_itself(stream: Stream) -> None:
    output = Terminal()
    board = Board([stream], output)
    board.changed()
    stream.answers.append("")
    board.finish()
    first_drawing, second_drawing = output.getvalue().split("\x1b[3A")
    assert (first_drawing.count("\n"), second_drawing.count("\n")) == (3, 4)


def test_the_summary_has_rates_of_each_and_of_all(stream: Stream) -> None:
    line = summary([stream, stream], distinct=7, seconds=4.0)
    assert line.startswith("7 distinct adapters shared a forward batch")
    assert line.endswith("8.0 tokens/s per stream, 8.0 tokens/s in all")
