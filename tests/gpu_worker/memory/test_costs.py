"""What it takes to bring something back, as measured."""

import pytest

from gpu_worker.memory import costs
from gpu_worker.memory.costs import CostModel


@pytest.fixture
def model() -> CostModel:
    return CostModel()


def test_an_adapter_costs_what_its_load_took(model: CostModel) -> None:
    model.loaded("a", 100, 3.0)
    assert model.load_seconds("a", 100) == 3.0


def test_later_loads_move_the_average(model: CostModel) -> None:
    model.loaded("a", 100, 1.0)
    for _ in range(50):
        model.loaded("a", 100, 2.0)
    assert model.load_seconds("a", 100) == pytest.approx(2.0, rel=1e-4)


def test_an_adapter_never_loaded_costs_what_its_bytes_would(model: CostModel) -> None:
    for _ in range(60):
        model.loaded("a", 100, 1.0)
    assert model.load_seconds("b", 300) == pytest.approx(3.0, rel=1e-3)


def test_prefill_seconds_are_per_token(model: CostModel) -> None:
    for _ in range(60):
        model.prefilled(10, 0.5)
    assert model.prefill_seconds_per_token == pytest.approx(0.05, rel=1e-3)


def test_the_memory_of_loads_is_bounded(model: CostModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "MAX_KNOWN_ADAPTERS", 2)
    for name in ("old", "mid", "old", "new"):
        model.loaded(name, 1, 7.0)
    unknown = model.load_seconds("never seen", 1)
    assert [model.load_seconds(name, 1) for name in ("old", "mid", "new")] == [7.0, unknown, 7.0]
