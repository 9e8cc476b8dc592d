"""The knobs of the core."""

from collections.abc import Mapping
from dataclasses import dataclass, field

POLICIES = ("fair", "vtc", "cluster", "fcfs", "lcfs", "abort")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Limits, shares and times of the core; `docs/scheduling.md` says what each does.

    Raises ValueError on a value out of range.
    """

    # Who goes first.
    policy: str = "fair"
    tenant_weights: Mapping[str, float] = field(default_factory=dict)
    session_grace_seconds: float = 1.0
    preempt_seconds: float = 0.05
    preempt_below_share: float = 0.5

    # The queue.
    max_queued_requests: int = 10_000
    max_queued_tokens: int = 20_000_000
    retry_after_seconds: float = 1.0

    # Admission.
    output_quantile: float = 0.9
    output_window: int = 64
    output_min_samples: int = 16
    max_waiting_requests: int = 32
    lookahead_lanes: int = 4
    max_overtaking: int = 64
    step_target_seconds: float = 0.1
    min_step_tokens: int = 128

    # Batching by adapter.
    max_batch_adapters: int = 0
    adapter_step_share: float = 0.1
    cluster_wait_seconds: float = 0.5
    cluster_slack_seconds: float = 0.25
    adapter_pool_share: float = 0.5
    rotation_seconds: float = 2.0
    max_prefetches: int = 8

    # Deadlines.
    ttft_slo_seconds: float = 0.0
    tenant_ttft_slo_seconds: Mapping[str, float] = field(default_factory=dict)
    abort_prefill_seconds: float = 0.5
    fetch_bytes_per_second: float = 200e6
    load_bytes_per_second: float = 2e9

    # Placement.
    spill_ratio: float = 1.25
    spill_margin_tokens: int = 512
    max_prefix_hashes: int = 4096
    rank_cost_share: float = 1.0
    replica_seconds: float = 1.0

    # Peers that come and go.
    worker_grace_seconds: float = 2.0
    gateway_grace_seconds: float = 0.5
    recovery_seconds: float = 2.0
    in_flight_tokens: int = 128
    fence_seconds: float = 10.0
    history_requests: int = 10_000

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"policy is {self.policy!r}, expected one of {', '.join(POLICIES)}")
        for name in ("output_quantile", "adapter_step_share", "adapter_pool_share", "preempt_below_share"):
            self._check(name, 0 < getattr(self, name) <= 1, "above 0 up to 1")
        self._check("spill_ratio", self.spill_ratio >= 1, "at least 1")
        for name in (
            "max_queued_requests",
            "max_queued_tokens",
            "max_waiting_requests",
            "in_flight_tokens",
            "output_window",
            "output_min_samples",
            "lookahead_lanes",
            "min_step_tokens",
            "history_requests",
        ):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            self._check(name, not isinstance(value, int | float) or value >= 0, "at least 0")
        for name in ("tenant_weights", "tenant_ttft_slo_seconds"):
            for tenant, value in getattr(self, name).items():
                if value <= 0:
                    raise ValueError(f"{name} of {tenant!r} is {value}, expected above 0")
        for name in ("fetch_bytes_per_second", "load_bytes_per_second"):
            self._check(name, getattr(self, name) > 0, "above 0")

    def _check(self, name: str, fine: bool, expected: str) -> None:
        if not fine:
            raise ValueError(f"{name} is {getattr(self, name)}, expected {expected}")

    def slo_seconds(self, tenant: str, asked: float | None) -> float | None:
        """Target for the first token of a request; None when there is none."""
        return asked or self.tenant_ttft_slo_seconds.get(tenant, self.ttft_slo_seconds) or None
