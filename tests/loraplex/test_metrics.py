"""The highest bucket of a histogram that holds an observation."""

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from loraplex.metrics import DISTINCT_ADAPTERS, fetch_metrics, histogram_maximum

BUCKETS = [*range(1, 17), 24, 32]


def exposition(*observations: float, labels: tuple[str, ...] = ()) -> str:
    registry = CollectorRegistry()
    histogram = Histogram(DISTINCT_ADAPTERS, "what is tested", labels, registry=registry, buckets=BUCKETS)
    for observation in observations:
        (histogram.labels(*labels) if labels else histogram).observe(observation)
    return generate_latest(registry).decode()


@pytest.mark.parametrize(
    ("observations", "maximum"),
    [((), 0), ((1,), 1), ((2, 7, 3), 7), ((7, 7, 1), 7), ((16,), 16), ((20,), 24), ((33,), float("inf"))],
    ids=str,
)
def test_the_maximum_is_the_highest_bucket_in_use(observations: tuple[int, ...], maximum: float) -> None:
    assert histogram_maximum(exposition(*observations), DISTINCT_ADAPTERS) == maximum


def test_labels_beside_the_bound_do_not_matter() -> None:
    assert histogram_maximum(exposition(5, labels=("model",)), DISTINCT_ADAPTERS) == 5


def test_another_histogram_does_not_count() -> None:
    assert histogram_maximum(exposition(5).replace(DISTINCT_ADAPTERS, "another"), DISTINCT_ADAPTERS) == 0


def test_a_dead_endpoint_is_an_os_error() -> None:
    with pytest.raises(OSError, match="refused"):
        fetch_metrics("127.0.0.1:1")
