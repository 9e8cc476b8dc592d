"""Reads the Prometheus text of a service's `/metrics`, as far as the demo and the tests need it."""

import re
from urllib.request import urlopen

FETCH_TIMEOUT_SECONDS = 10.0
DISTINCT_ADAPTERS = "loraplex_worker_batch_distinct_adapters"
KERNEL_CALLS = "loraplex_worker_kernel_calls_total"


def fetch_metrics(address: str) -> str:
    """The text of `http://HOST:PORT/metrics`. Raises OSError when nobody answers."""
    with urlopen(f"http://{address}/metrics", timeout=FETCH_TIMEOUT_SECONDS) as response:
        text: str = response.read().decode()
    return text


def kernel_calls(text: str) -> dict[str, int]:
    """Operations of a worker's forward passes by what ran them: `cpu` (compiled), `triton`, `reference`."""
    found = re.findall(rf'^{KERNEL_CALLS}{{backend="(\w+)"}} (\S+)$', text, re.MULTILINE)
    return {backend: int(float(calls)) for backend, calls in found}


def histogram_maximum(text: str, name: str) -> float:
    """Upper bound of the highest bucket of histogram `name` that holds an observation; 0 when none does.

    It is the largest observation itself where buckets are one unit wide. Series with different labels count together.
    """
    counts: dict[float, float] = {}
    series = re.compile(rf'^{re.escape(name)}_bucket{{(?:.*,)?le="([^"]+)".*}} (\S+)', re.MULTILINE)
    for bound, count in series.findall(text):
        counts[float(bound)] = counts.get(float(bound), 0.0) + float(count)
    highest, below = 0.0, 0.0
    for bound in sorted(counts):
        if counts[bound] > below:
            highest, below = bound, counts[bound]
    return highest
