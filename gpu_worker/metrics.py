"""A worker's figures, filled from the engine's step statistics. No adapter or tenant is a label."""

from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from common.wire import dtype_from_proto
from gpu_worker.residency import Residency
from gpu_worker.vllm_metrics import VllmMetrics
from loraplex.v1 import engine_pb2, scheduler_pb2, types_pb2

# One bucket a value up to 16: small batches are read off exactly.
_DISTINCT_BUCKETS = (*range(1, 17), 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)
_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_STEP_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_COPY_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0)
_LOAD_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass(frozen=True)
class Instruments:
    """Makes metrics in one registry."""

    registry: CollectorRegistry

    def counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def gauge(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

    def histogram(self, name: str, text: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ()) -> Histogram:
        return Histogram(name, text, labels, buckets=buckets, registry=self.registry)


class WorkerMetrics:
    """Everything /metrics of a worker shows beside the process's own figures."""

    def __init__(self, registry: CollectorRegistry, *, vllm_names: bool = False) -> None:
        """With `vllm_names` the figures that other routers and boards ask for have vLLM's names as well."""
        self._vllm = VllmMetrics(registry) if vllm_names else None
        make = Instruments(registry)
        self._make_pool(make)
        self._make_steps(make)
        self._make_adapters(make)
        self._seen_loads = 0
        self._seen_evictions = 0
        self._residency = Residency()

    def _make_pool(self, make: Instruments) -> None:
        self._pages = make.gauge("loraplex_worker_pages", "Pages of the pool by what they hold", ("kind",))
        self._kv_usage = make.gauge("loraplex_worker_kv_cache_usage_ratio", "Share of the pool that holds KV")
        self._page_bytes = make.gauge("loraplex_worker_page_bytes", "Size of a page of the pool")
        self._evictable = make.gauge(
            "loraplex_worker_evictable_pages", "Pages that cold adapters and prefixes would yield"
        )
        self._prefix_queries = make.counter(
            "loraplex_worker_prefix_cache_query_tokens", "Prompt tokens looked up in the prefix cache"
        )
        self._prefix_hits = make.counter("loraplex_worker_prefix_cache_hit_tokens", "Prompt tokens found there")

    def _make_steps(self, make: Instruments) -> None:
        self._model = make.gauge("loraplex_worker_info", "1, with the model that is served", ("model", "dtype"))
        self._running = make.gauge("loraplex_worker_running_requests", "Sequences that hold pages")
        self._waiting = make.gauge("loraplex_worker_waiting_requests", "Sequences in the local queue")
        self._parts = make.counter("loraplex_worker_step_part_seconds", "Where the time of the steps went", ("part",))
        self._preemptions = make.counter("loraplex_worker_preemptions", "Sequences that gave their pages back")
        self._tokens = make.counter("loraplex_worker_step_tokens", "Tokens computed", ("phase",))
        self._finished = make.counter("loraplex_worker_finish", "Outputs that ended", ("reason",))
        self._last_step = make.gauge("loraplex_worker_last_step_timestamp_seconds", "When the last step ended")
        self._restarts = make.counter("loraplex_worker_engine_restarts", "Engine processes started after the first")
        self._kernel_calls = make.counter(
            "loraplex_worker_kernel_calls",
            "Operations of forward passes by what ran them: cpu (compiled), triton, reference (plain PyTorch)",
            ("backend",),
        )
        self._batch_size = make.histogram("loraplex_worker_batch_size", "Sequences in a forward batch", _BATCH_BUCKETS)
        self._distinct = make.histogram(
            "loraplex_worker_batch_distinct_adapters",
            "Distinct adapters in a forward batch; the base model counts as one",
            _DISTINCT_BUCKETS,
        )
        self._step_seconds = make.histogram(
            "loraplex_worker_step_seconds", "Seconds of a step, without waiting", _STEP_BUCKETS, ("phase",)
        )

    def _make_adapters(self, make: Instruments) -> None:
        self._resident = make.gauge("loraplex_adapter_resident_count", "Adapters by tier", ("tier",))
        self._resident_bytes = make.gauge("loraplex_adapter_resident_bytes", "Bytes of adapters by tier", ("tier",))
        self._pinned = make.gauge("loraplex_adapter_pinned_count", "Adapters that operators keep in pages")
        self._capacity = make.gauge("loraplex_adapter_capacity_bytes", "What a tier may hold at most", ("tier",))
        self._reloads = make.counter(
            "loraplex_adapter_reloads_within_60s", "Loads of adapters that were evicted less than a minute before"
        )
        self._loads = make.counter("loraplex_adapter_loads", "Adapters copied to a tier", ("from_tier", "to_tier"))
        self._evictions = make.counter("loraplex_adapter_evictions", "Adapters whose pages were taken", ("tier",))
        self._failures = make.counter("loraplex_adapter_load_failures", "Adapters that did not arrive", ("reason",))
        self._fetch_seconds = make.histogram(
            "loraplex_adapter_fetch_seconds",
            "Seconds from asking the store to having the adapter in the host tier",
            _LOAD_BUCKETS,
        )
        self._load_seconds = make.histogram(
            "loraplex_adapter_load_seconds",
            "Seconds of a copy from the host tier into pages, by the adapter's largest rank",
            _COPY_BUCKETS,
            ("rank_bucket",),
        )
        for tiers in (("store", "host"), ("host", "pages")):
            self._loads.labels(*tiers)
        self._evictions.labels("pages")
        self._failures.labels("adapter_corrupt")

    def serves(self, ready: engine_pb2.EngineReady) -> None:
        """The first engine is ready."""
        self._memory(ready.memory)
        self._model.labels(ready.model.name, dtype_from_proto(ready.model.geometry.dtype)).set(1)
        if self._vllm:
            self._vllm.serves(ready)

    def offered(self, request: types_pb2.RequestSpec) -> None:
        """A request was offered to this worker."""
        if self._vllm:
            self._vllm.offered(request)

    def step(self, result: engine_pb2.StepResult, now: float) -> None:
        """Books one step; `now` is Unix time in seconds."""
        report = result.report
        self._running.set(report.running_sequences)
        self._waiting.set(report.waiting_sequences)
        self._memory(report.memory)
        for finished in result.finished:
            self._finished.labels(finished.reason).inc(finished.outputs)
        for load in result.loads:
            self._load_seconds.labels(_rank_bucket(load.lora_rank)).observe(load.seconds)
        self._reloads.inc(self._residency.apply(report.residency, now))
        self._resident.labels("pages").set(len(self._residency))
        if self._vllm:
            self._vllm.step(report, self._residency, now)
        if result.HasField("stats"):
            self._stats(result.stats)
            self._last_step.set(now)

    def fetched(self, seconds: float) -> None:
        self._fetch_seconds.observe(seconds)
        self._loads.labels("store", "host").inc()

    def load_failed(self, reason: str) -> None:
        self._failures.labels(reason.lower()).inc()

    def engine_restarted(self, ready: engine_pb2.EngineReady) -> None:
        """What the engine before it held is gone, pins included."""
        self._restarts.inc()
        self._memory(ready.memory)
        self._seen_loads = self._seen_evictions = 0
        self._residency = Residency()

    def _memory(self, memory: scheduler_pb2.MemoryUsage) -> None:
        for kind in ("free", "quarantined", "loading", "kv", "prefix", "adapter"):
            self._pages.labels(kind).set(getattr(memory, f"{kind}_pages"))
        self._kv_usage.set(memory.kv_pages / max(1, memory.total_pages))
        self._page_bytes.set(memory.page_bytes)
        self._evictable.set(memory.evictable_pages)
        self._resident_bytes.labels("pages").set(memory.adapter_pages * memory.page_bytes)
        self._resident_bytes.labels("host").set(memory.host_adapter_bytes)
        self._resident.labels("host").set(memory.host_adapters)
        self._pinned.set(memory.pinned_adapters)
        self._capacity.labels("pages").set(memory.total_pages * memory.page_bytes)
        self._capacity.labels("host").set(memory.host_limit_bytes)

    def _stats(self, stats: engine_pb2.StepStats) -> None:
        self._batch_size.observe(stats.sequences)
        self._distinct.observe(stats.distinct_adapters)
        self._preemptions.inc(stats.preemptions)
        self._tokens.labels("prefill").inc(stats.prefill_tokens)
        self._tokens.labels("decode").inc(stats.decode_tokens)
        mixed = "mixed" if stats.prefill_tokens and stats.decode_tokens else ""
        phase = mixed or ("prefill" if stats.prefill_tokens else "decode")
        seconds = stats.schedule_seconds + stats.forward_seconds + stats.sample_seconds
        self._step_seconds.labels(phase).observe(seconds)
        for part in ("schedule", "forward", "sample"):
            self._parts.labels(part).inc(getattr(stats, f"{part}_seconds"))
        for ran in stats.backend_calls:
            self._kernel_calls.labels(ran.backend).inc(ran.calls)
        self._prefix_queries.inc(stats.prefix_query_tokens)
        self._prefix_hits.inc(stats.prefix_hit_tokens)
        self._loads.labels("host", "pages").inc(stats.adapter_loads - self._seen_loads)
        self._evictions.labels("pages").inc(stats.adapter_evictions - self._seen_evictions)
        self._seen_loads, self._seen_evictions = stats.adapter_loads, stats.adapter_evictions


def _rank_bucket(lora_rank: int) -> str:
    return next((f"le{bound}" for bound in (8, 16, 32, 64) if lora_rank <= bound), "gt64")
