"""What could not be fetched is remembered for a short while, with its reason."""

import pytest

from common.errors import DataLoss, Unavailable
from gpu_worker.refusals import AWAY_SECONDS, BAD_SECONDS, MAX_REMEMBERED, Refusals


@pytest.fixture
def refusals() -> Refusals:
    return Refusals()


def test_a_bad_adapter_is_remembered_with_its_reason(refusals: Refusals) -> None:
    refusals.note("t", "a", DataLoss("ADAPTER_CORRUPT", "wrong bytes"), 100.0)
    again = refusals.find("t", "a", 101.0)
    assert isinstance(again, DataLoss)
    assert (again.reason, again.retry_after_seconds) == ("ADAPTER_CORRUPT", BAD_SECONDS - 1)
    assert again.message.startswith("wrong bytes (found before")


def test_it_is_forgotten_soon(refusals: Refusals) -> None:
    refusals.note("t", "a", DataLoss("ADAPTER_CORRUPT", "wrong bytes"), 100.0)
    assert refusals.find("t", "a", 100.0 + BAD_SECONDS) is None


@pytest.mark.parametrize("other", [("t", "b"), ("u", "a")], ids=["adapter", "tenant"])
def test_another_is_not_concerned(refusals: Refusals, other: tuple[str, str]) -> None:
    refusals.note("t", "a", DataLoss("ADAPTER_CORRUPT", "wrong bytes"), 100.0)
    assert refusals.find(*other, 101.0) is None


def test_a_store_that_is_away_is_away_for_all(refusals: Refusals) -> None:
    refusals.note("t", "a", Unavailable("STORE", "away"), 100.0)
    known = refusals.find("u", "b", 100.5)
    assert known is not None
    assert known.reason == "STORE"
    assert refusals.find("u", "b", 100.0 + AWAY_SECONDS) is None


def test_a_crowd_of_bad_adapters_takes_bounded_memory(refusals: Refusals) -> None:
    for number in range(MAX_REMEMBERED + 10):
        refusals.note("t", f"a{number}", DataLoss("ADAPTER_CORRUPT", "wrong bytes"), 100.0)
    assert len(refusals) == MAX_REMEMBERED
