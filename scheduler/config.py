"""Options of the scheduler."""

from dataclasses import dataclass

from common.config import ServiceConfig, option
from scheduler.core.settings import Settings


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig(ServiceConfig):
    """Decides who runs where, when and in which order: queues, admission, placement."""

    port: int = option(50052, help="gRPC port; 0 takes a free one")
    metrics_port: int = option(9152, help="port of /metrics; 0 takes a free one")
    max_queued_requests: int = option(10_000, help="requests queued at once; more are RESOURCE_EXHAUSTED")
    max_queued_tokens: int = option(20_000_000, help="prompt plus max_tokens of all queued requests at most")
    output_estimate_ratio: float = option(
        1.0, help="expected output in parts of max_tokens; below 1 workers get more and preempt when it was too much"
    )
    max_waiting_requests: int = option(32, help="requests a worker has and has not admitted, at most")
    spill_ratio: float = option(
        1.25, help="a request leaves the workers of its adapter when their load exceeds this many times another's ..."
    )
    spill_margin_tokens: int = option(512, help="... plus this many tokens")
    worker_grace_seconds: float = option(
        2.0, help="how long requests wait for a first worker, and a lost worker's requests are remembered"
    )
    gateway_grace_seconds: float = option(0.5, help="how long a lost gateway's requests run on before they are aborted")
    recovery_seconds: float = option(2.0, help="how long after its start the scheduler only listens to the workers")
    in_flight_tokens: int = option(128, help="output still expected of sequences that ran before the start")
    retry_after_seconds: float = option(1.0, help="the hint in refusals that may be tried again")

    @property
    def settings(self) -> Settings:
        """Raises ValueError on a value out of range."""
        return Settings(
            max_queued_requests=self.max_queued_requests,
            max_queued_tokens=self.max_queued_tokens,
            output_estimate_ratio=self.output_estimate_ratio,
            max_waiting_requests=self.max_waiting_requests,
            spill_ratio=self.spill_ratio,
            spill_margin_tokens=self.spill_margin_tokens,
            worker_grace_seconds=self.worker_grace_seconds,
            gateway_grace_seconds=self.gateway_grace_seconds,
            recovery_seconds=self.recovery_seconds,
            in_flight_tokens=self.in_flight_tokens,
            retry_after_seconds=self.retry_after_seconds,
        )
