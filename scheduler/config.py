"""Options of the scheduler."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from common.config import ServiceConfig, option
from common.redis_client import RedisConfig
from scheduler.core.settings import POLICIES, Settings

_DEFAULTS: dict[str, Any] = {spec.name: spec.default for spec in fields(Settings) if spec.default is not MISSING}


def _setting(name: str, help: str, choices: tuple[str, ...] = ()) -> Any:
    """An option of the same name and default as the core's setting."""
    return option(_DEFAULTS[name], help=help, choices=choices)


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig(RedisConfig, ServiceConfig):
    """Decides who runs where, when and in which order: queues, fairness, admission, placement."""

    port: int = option(50052, help="gRPC port; 0 takes a free one")
    metrics_port: int = option(9152, help="port of /metrics; 0 takes a free one")
    redis: str = option(
        "", help="redis://HOST:PORT/DB, rediss:// or unix://: of several schedulers one is active; empty: there is one"
    )
    lease_seconds: float = option(3.0, help="how long the active scheduler may be silent before a standby takes over")
    policy: str = _setting("policy", "who goes first", POLICIES)
    tenant_weights: str = option("", help="shares of tenants as NAME=WEIGHT,...; 1 for the others")
    session_grace_seconds: float = _setting(
        "session_grace_seconds", "in which a tenant that comes back keeps its place"
    )
    preempt_seconds: float = _setting("preempt_seconds", "between two preemptions for a tenant on a worker, at least")
    preempt_below_share: float = _setting(
        "preempt_below_share", "part of its share of a worker below which one is made"
    )
    max_queued_requests: int = _setting("max_queued_requests", "requests queued at once; more are RESOURCE_EXHAUSTED")
    max_queued_tokens: int = _setting("max_queued_tokens", "prompt plus max_tokens of all queued requests at most")
    retry_after_seconds: float = _setting("retry_after_seconds", "the hint in refusals that may be tried again")
    output_quantile: float = _setting("output_quantile", "quantile of an adapter's recent outputs that is expected")
    output_window: int = _setting("output_window", "recent outputs of each adapter that are remembered")
    output_min_samples: int = _setting("output_min_samples", "outputs before which max_tokens is expected")
    max_waiting_requests: int = _setting("max_waiting_requests", "requests a worker has and has not admitted, at most")
    lookahead_lanes: int = _setting("lookahead_lanes", "heads that are tried when the first does not fit")
    max_overtaking: int = _setting("max_overtaking", "requests that may go before one that does not fit")
    step_target_seconds: float = _setting("step_target_seconds", "how long a worker's step should take; 0: any time")
    min_step_tokens: int = _setting("min_step_tokens", "tokens that a step is always allowed")
    max_batch_adapters: int = _setting("max_batch_adapters", "adapters per batch, softly; 0: by adapter_step_share")
    adapter_step_share: float = _setting("adapter_step_share", "share of a step that distinct adapters may take")
    cluster_wait_seconds: float = _setting("cluster_wait_seconds", "how long adapters in use may go first")
    cluster_slack_seconds: float = _setting("cluster_slack_seconds", "service they may get ahead of their share")
    adapter_pool_share: float = _setting("adapter_pool_share", "share of the pool for adapters in use at once")
    rotation_seconds: float = _setting("rotation_seconds", "turn of an adapter when not all that are asked for fit")
    max_prefetches: int = _setting("max_prefetches", "heads of a line whose adapters are fetched ahead")
    ttft_slo_seconds: float = _setting("ttft_slo_seconds", "objective for the first token by default; 0: none")
    tenant_ttft_slo_seconds: str = option("", help="objectives of tenants as NAME=SECONDS,...")
    abort_prefill_seconds: float = _setting("abort_prefill_seconds", "time of every prefill for policy abort")
    fetch_bytes_per_second: float = _setting("fetch_bytes_per_second", "from the store to a worker, for estimates")
    load_bytes_per_second: float = _setting("load_bytes_per_second", "from host memory to pages, for estimates")
    spill_ratio: float = _setting("spill_ratio", "work is far above another's when it exceeds this many times it ...")
    spill_margin_tokens: int = _setting("spill_margin_tokens", "... plus this many tokens")
    max_prefix_hashes: int = _setting("max_prefix_hashes", "prompt beginnings remembered for each worker")
    rank_cost_share: float = _setting(
        "rank_cost_share", "share of the time an adapter adds to steps that counts as work"
    )
    replica_seconds: float = _setting("replica_seconds", "between two further homes of an adapter, at least")
    worker_grace_seconds: float = _setting(
        "worker_grace_seconds", "how long requests wait for a first worker, and a lost worker's requests are remembered"
    )
    gateway_grace_seconds: float = _setting(
        "gateway_grace_seconds", "how long a lost gateway's requests run on before they are aborted"
    )
    recovery_seconds: float = _setting("recovery_seconds", "how long a new scheduler only listens to the workers")
    in_flight_tokens: int = _setting("in_flight_tokens", "output still expected of sequences from before the start")
    fence_seconds: float = _setting("fence_seconds", "how long a worker that reports nonsense is kept out")
    max_tenant_labels: int = option(100, help="tenants that metrics name; the others are counted as _other")
    history_requests: int = _setting("history_requests", "requests whose timelines are kept after their end")

    def __post_init__(self) -> None:
        """Raises ValueError naming the option that is out of range."""
        RedisConfig.__post_init__(self)
        ServiceConfig.__post_init__(self)
        if not self.lease_seconds > 2 * self.redis_timeout_seconds:
            raise ValueError(
                f"lease_seconds is {self.lease_seconds}; it must exceed twice redis_timeout_seconds, "
                f"which is {self.redis_timeout_seconds}"
            )

    @property
    def settings(self) -> Settings:
        """Raises ValueError on a value out of range."""
        values: dict[str, Any] = {spec.name: getattr(self, spec.name) for spec in fields(Settings)}
        for name in ("tenant_weights", "tenant_ttft_slo_seconds"):
            values[name] = _by_tenant(name, values[name])
        return Settings(**values)


def _by_tenant(name: str, text: str) -> Mapping[str, float]:
    """Raises ValueError unless the text is a list of NAME=NUMBER."""
    result: dict[str, float] = {}
    for item in filter(None, text.split(",")):
        tenant, separator, value = item.partition("=")
        try:
            result[tenant] = float(value)
        except ValueError:
            separator = ""
        if not separator or not tenant:
            raise ValueError(f"{name} has {item!r}, expected NAME=NUMBER")
    return result
