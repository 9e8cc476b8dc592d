"""What was hot survives a restart, in a file that is whole or absent."""

import json
from pathlib import Path

import pytest

from gpu_worker.warm_set import FILE_NAME, HALF_LIFE_SECONDS, MAX_ADAPTERS, WarmSet


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def warm_set(tmp_path: Path, clock: Clock) -> WarmSet:
    return WarmSet(tmp_path, clock)


def test_the_hottest_comes_first(warm_set: WarmSet, tmp_path: Path) -> None:
    for name in ("a", "b", "b", "c", "c", "c"):
        warm_set.note("t", name)
    warm_set.write()
    assert WarmSet(tmp_path).read() == [("t", "c"), ("t", "b"), ("t", "a")]


def test_demand_halves_with_time(warm_set: WarmSet, clock: Clock) -> None:
    for _ in range(3):
        warm_set.note("t", "old")
    clock.now = 2 * HALF_LIFE_SECONDS
    warm_set.note("t", "new")
    assert warm_set.hottest() == [("t", "new"), ("t", "old")]


def test_what_nobody_wants_any_more_is_forgotten(warm_set: WarmSet, clock: Clock) -> None:
    warm_set.note("t", "old")
    clock.now = 20 * HALF_LIFE_SECONDS
    assert warm_set.hottest() == []


def test_the_file_is_bounded(warm_set: WarmSet, tmp_path: Path) -> None:
    for number in range(2 * MAX_ADAPTERS):
        warm_set.note("t", str(number))
    warm_set.write()
    assert len(WarmSet(tmp_path).read()) == MAX_ADAPTERS


@pytest.mark.parametrize("text", ["", "{", "[]", '{"adapters": 3}', '{"adapters": [{"tenant": "t"}]}'])
def test_a_file_that_makes_no_sense_is_an_empty_one(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE_NAME).write_text(text)
    assert WarmSet(tmp_path).read() == []


def test_nothing_is_written_when_nothing_changed(warm_set: WarmSet, tmp_path: Path) -> None:
    warm_set.write()
    assert not (tmp_path / FILE_NAME).exists()


def test_a_file_that_cannot_be_written_costs_nothing_else(warm_set: WarmSet, tmp_path: Path) -> None:
    # Not even root can write a file over a folder.
    (tmp_path / FILE_NAME).mkdir()
    warm_set.note("t", "a")
    warm_set.write()
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_no_more_than_ids_are_written(warm_set: WarmSet, tmp_path: Path) -> None:
    warm_set.note("t", "a")
    warm_set.write()
    assert json.loads((tmp_path / FILE_NAME).read_text()) == {"adapters": [{"tenant": "t", "adapter_version": "a"}]}
