"""What the store counts. No label ever holds a string of a client."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_FETCH_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


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
        for result in ("ok", "duplicate"):
            self.uploads.labels(result, "")
        for result in ("ok", "broken"):
            self.fetch_seconds.labels(result)
            self.fetch_bytes.labels(result)
