"""The figure whose labels are tenants: who is named, and what the others are."""

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from scheduler.metrics import FairnessDeficit

NAME = "loraplex_scheduler_fairness_deficit_seconds"


def shown(deficits: dict[str, float], submitted: list[str], limit: int = 2) -> dict[str, float]:
    """Tenant -> value."""
    registry = CollectorRegistry()
    deficit = FairnessDeficit(registry, "seconds", lambda: deficits, limit)
    for tenant in submitted:
        deficit.submitted(tenant)
    (metric,) = registry.collect()
    assert metric.name == NAME
    return {sample.labels["tenant"]: sample.value for sample in metric.samples}


def test_a_tenant_that_does_not_wait_lacks_nothing() -> None:
    assert shown({"a": 3.0}, ["a", "b"]) == {"a": 3.0, "b": 0.0, "_other": 0.0}


def test_of_those_that_are_not_named_the_furthest_behind_is_shown() -> None:
    assert shown({"a": 3.0, "c": 5.0, "d": 9.0}, ["a", "b", "c", "d"]) == {"a": 3.0, "b": 0.0, "_other": 9.0}


@pytest.mark.parametrize("num_tenants", [1_000])
def test_there_is_a_bounded_number_of_series(num_tenants: int) -> None:
    tenants = [f"t{number}" for number in range(num_tenants)]
    assert len(shown(dict.fromkeys(tenants, 1.0), tenants, limit=100)) == 101


def test_a_name_cannot_break_out_of_its_label() -> None:
    registry = CollectorRegistry()
    FairnessDeficit(registry, "seconds", lambda: {}, 2).submitted('a"} 1\nmine{b="')
    lines = generate_latest(registry).decode().splitlines()
    assert len([line for line in lines if not line.startswith("#")]) == 2
