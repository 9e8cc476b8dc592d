"""Half a minute of fuzzing; `make fuzz` takes its time."""

from pathlib import Path

import pytest

from tests.fuzz.campaign import run_campaign
from tests.fuzz.targets import TARGETS, Counts

pytest.importorskip("atheris", reason="atheris is not to be had for this platform")

SECONDS = 15


@pytest.mark.parametrize("name", list(TARGETS))
def test_a_fuzzer_finds_nothing(tmp_path: Path, name: str) -> None:
    report = run_campaign(name, SECONDS, tmp_path)
    assert report.finding == ""
    assert report.parsed_share >= 0.2
    assert report.coverage >= 0.9
    assert report.counts.inputs > 1000


@pytest.mark.parametrize("name", list(TARGETS))
def test_some_seeds_are_accepted_and_some_refused(name: str) -> None:
    counts = Counts()
    for seed in TARGETS[name].seeds():
        TARGETS[name].run(seed, counts)
    assert 0 < counts.accepted < counts.inputs
