"""What a worker's /metrics shows of what its engine reports."""

import pytest
from prometheus_client import CollectorRegistry

from gpu_worker.metrics import WorkerMetrics
from loraplex.v1 import engine_pb2, scheduler_pb2, types_pb2


def delta(digest: str, tier: "types_pb2.Tier.ValueType") -> scheduler_pb2.ResidencyDelta:
    return scheduler_pb2.ResidencyDelta(adapter=scheduler_pb2.ResidentAdapter(adapter_version=digest, tier=tier))


def residency(*deltas: scheduler_pb2.ResidencyDelta) -> engine_pb2.StepResult:
    return engine_pb2.StepResult(report=scheduler_pb2.StepReport(residency=deltas))


def ready() -> engine_pb2.EngineReady:
    geometry = types_pb2.ModelGeometry(dtype=types_pb2.DTYPE_FLOAT32)
    return engine_pb2.EngineReady(
        model=types_pb2.ModelIdentity(name="tiny", geometry=geometry),
        capacity=scheduler_pb2.WorkerCapacity(page_size=16, num_pages=64),
    )


IN, OUT = types_pb2.TIER_PAGES, types_pb2.TIER_HOST


@pytest.mark.parametrize(("seconds", "reloads"), [(59, 1), (61, 0)])
def test_an_adapter_that_comes_back_within_a_minute_is_counted(seconds: float, reloads: int) -> None:
    registry = CollectorRegistry()
    metrics = WorkerMetrics(registry)
    metrics.step(residency(delta("a", IN)), 1000.0)
    metrics.step(residency(delta("a", OUT)), 1010.0)
    metrics.step(residency(delta("a", IN)), 1010.0 + seconds)
    assert registry.get_sample_value("loraplex_adapter_reloads_within_60s_total") == reloads


def test_resident_adapters_are_those_in_pages() -> None:
    registry = CollectorRegistry()
    WorkerMetrics(registry).step(residency(delta("a", IN), delta("b", IN), delta("a", OUT)), 0.0)
    assert registry.get_sample_value("loraplex_adapter_resident_count", {"tier": "pages"}) == 1


def test_a_load_is_timed_by_rank() -> None:
    registry = CollectorRegistry()
    load = engine_pb2.AdapterLoad(seconds=0.5, lora_rank=33)
    WorkerMetrics(registry).step(engine_pb2.StepResult(loads=[load]), 0.0)
    assert registry.get_sample_value("loraplex_adapter_load_seconds_sum", {"rank_bucket": "le64"}) == 0.5


@pytest.mark.parametrize(
    ("name", "pages", "host"),
    [
        ("loraplex_adapter_resident_bytes", 300, 7),
        ("loraplex_adapter_capacity_bytes", 1000, 9),
        ("loraplex_adapter_resident_count", 1, 2),
    ],
)
def test_each_tier_says_what_it_holds_and_may_hold(name: str, pages: int, host: int) -> None:
    registry = CollectorRegistry()
    memory = scheduler_pb2.MemoryUsage(total_pages=10, adapter_pages=3, page_bytes=100)
    memory.host_adapter_bytes, memory.host_limit_bytes, memory.host_adapters = 7, 9, 2
    report = scheduler_pb2.StepReport(memory=memory, residency=[delta("a", IN)])
    WorkerMetrics(registry).step(engine_pb2.StepResult(report=report), 0.0)
    assert [registry.get_sample_value(name, {"tier": tier}) for tier in ("pages", "host")] == [pages, host]


def test_pins_end_with_their_engine() -> None:
    registry = CollectorRegistry()
    metrics = WorkerMetrics(registry)
    metrics.serves(ready())
    seen = [registry.get_sample_value("loraplex_adapter_pinned_count")]
    memory = scheduler_pb2.MemoryUsage(pinned_adapters=2)
    metrics.step(engine_pb2.StepResult(report=scheduler_pb2.StepReport(memory=memory)), 0.0)
    seen.append(registry.get_sample_value("loraplex_adapter_pinned_count"))
    metrics.engine_restarted(ready())
    assert [*seen, registry.get_sample_value("loraplex_adapter_pinned_count")] == [0, 2, 0]


def test_pages_are_shown_before_the_first_step() -> None:
    registry = CollectorRegistry()
    started = ready()
    started.memory.free_pages = 64
    WorkerMetrics(registry).serves(started)
    assert registry.get_sample_value("loraplex_worker_pages", {"kind": "free"}) == 64


def test_prefix_hits_are_a_part_of_what_was_looked_up() -> None:
    registry = CollectorRegistry()
    stats = engine_pb2.StepStats(prefix_query_tokens=48, prefix_hit_tokens=32)
    WorkerMetrics(registry).step(engine_pb2.StepResult(stats=stats), 0.0)
    names = ("query", "hit")
    shown = [registry.get_sample_value(f"loraplex_worker_prefix_cache_{name}_tokens_total") for name in names]
    assert shown == [48, 32]


def vllm_lists(registry: CollectorRegistry) -> list[tuple[str, str]]:
    """(running, waiting) of every live lora series."""
    (metric,) = [metric for metric in registry.collect() if metric.name == "vllm:lora_requests_info"]
    return [
        (sample.labels["running_lora_adapters"], sample.labels["waiting_lora_adapters"]) for sample in metric.samples
    ]


def test_vllm_names_are_there_only_when_asked_for() -> None:
    registry = CollectorRegistry()
    WorkerMetrics(registry).serves(ready())
    assert not [metric.name for metric in registry.collect() if metric.name.startswith("vllm:")]


def test_vllm_sees_one_series_with_the_adapters_in_pages_and_those_waiting() -> None:
    registry = CollectorRegistry()
    metrics = WorkerMetrics(registry, vllm_names=True)
    metrics.serves(ready())
    for digest, name in (("a", "first"), ("b", "second")):
        key = types_pb2.RequestKey(request_id=name)
        metrics.offered(types_pb2.RequestSpec(key=key, adapter_version=digest, adapter_id=name))
    waiting = scheduler_pb2.RequestProgress(
        key=types_pb2.RequestKey(request_id="second"),
        adapter_version="b",
        state=scheduler_pb2.REQUEST_STATE_WAITING,
    )
    report = scheduler_pb2.StepReport(progress=[waiting], residency=[delta("a", IN)], waiting_sequences=1)
    metrics.step(engine_pb2.StepResult(report=report), 5.0)
    assert vllm_lists(registry) == [("first", "second")]
    assert registry.get_sample_value("vllm:num_requests_waiting", {"model_name": "tiny"}) == 1
    waiting.state = scheduler_pb2.REQUEST_STATE_RUNNING
    report = scheduler_pb2.StepReport(progress=[waiting], residency=[delta("b", IN)])
    metrics.step(engine_pb2.StepResult(report=report), 6.0)
    assert vllm_lists(registry) == [("second,first", "")]
    sizes = {"block_size": "16", "num_gpu_blocks": "64"}
    assert registry.get_sample_value("vllm:cache_config_info", sizes) == 1
