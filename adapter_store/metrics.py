"""What the store counts. No label ever holds a string of a client."""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_FETCH_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

# A caller waits 0.15 s at most, unless the operator says otherwise.
_REDIS_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.3, 1.0)


class StoreMetrics:
    """The store's own metrics, on the registry of its server."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.adapters = Gauge("loraplex_store_adapters", "Ids that point to a version", registry=registry)
        self.stored_bytes = Gauge("loraplex_store_bytes", "Bytes on disk of all versions", registry=registry)
        self.disk_free_bytes = Gauge("loraplex_store_disk_free_bytes", "Free bytes of the disk", registry=registry)
        self.disk_size_bytes = Gauge("loraplex_store_disk_size_bytes", "Size of the disk", registry=registry)
        self.uploads = Counter(
            "loraplex_store_uploads", "Uploads by result and reason", ("result", "reason"), registry=registry
        )
        self.fetch_seconds = Histogram(
            "loraplex_store_fetch_seconds",
            "Duration of one fetch of packed weights",
            ("result",),
            buckets=_FETCH_BUCKETS,
            registry=registry,
        )
        self.fetch_bytes = Counter(
            "loraplex_store_fetch_bytes", "Packed bytes sent to workers", ("result",), registry=registry
        )
        self.verify_failures = Counter(
            "loraplex_store_verify_failures", "Stored bytes that failed their sha256", ("stage",), registry=registry
        )
        self.verify_failures.labels("read")
        for result in ("ok", "duplicate"):
            self.uploads.labels(result, "")
        for result in ("ok", "broken"):
            self.fetch_seconds.labels(result)
            self.fetch_bytes.labels(result)


class RedisMetrics:
    """How the store's Redis is, as this process sees it."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.up = Gauge("loraplex_redis_up", "1 while Redis answers", registry=registry)
        self.errors = Counter("loraplex_redis_errors", "Failed calls of Redis by kind", ("error",), registry=registry)
        for error in ("ConnectionError", "TimeoutError"):
            self.errors.labels(error)
        self.command_seconds = Histogram(
            "loraplex_redis_command_seconds",
            "Duration of one command of Redis, also of one that failed",
            buckets=_REDIS_BUCKETS,
            registry=registry,
        )
        age = Gauge("loraplex_store_index_age_seconds", "Time since the index was up to Redis", registry=registry)
        age.set_function(lambda: time.monotonic() - self._synced)
        self._synced = time.monotonic()

    def synced(self) -> None:
        self._synced = time.monotonic()
