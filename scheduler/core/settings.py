"""The knobs of the core."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Limits and times of the core. Raises ValueError on a value out of range."""

    max_queued_requests: int = 10_000
    # Prompt plus `max_tokens` of all queued requests.
    max_queued_tokens: int = 20_000_000
    # Expected output in parts of `max_tokens`. Below 1 a worker is given more than it can hold at the worst, and
    # preempts when the worst happens.
    output_estimate_ratio: float = 1.0
    # Requests on a worker that it has not admitted, at most.
    max_waiting_requests: int = 32
    # A request leaves the workers that have its adapter when their work exceeds
    # `spill_ratio * (work of another) + spill_margin_tokens`.
    spill_ratio: float = 1.25
    spill_margin_tokens: int = 512
    # How long requests wait for a first worker, and how long a lost worker's requests are remembered.
    worker_grace_seconds: float = 2.0
    # How long the requests of a lost gateway may go on before they are aborted.
    gateway_grace_seconds: float = 0.5
    # How long a new scheduler listens to the workers that are there before it places anything.
    recovery_seconds: float = 2.0
    # Output still expected of a sequence that ran before this scheduler started.
    in_flight_tokens: int = 128
    retry_after_seconds: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.output_estimate_ratio <= 1:
            raise ValueError(f"output_estimate_ratio is {self.output_estimate_ratio}, expected above 0 up to 1")
        if self.spill_ratio < 1:
            raise ValueError(f"spill_ratio is {self.spill_ratio}, expected at least 1")
        for name in ("max_queued_requests", "max_queued_tokens", "max_waiting_requests", "in_flight_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in (
            "spill_margin_tokens",
            "worker_grace_seconds",
            "gateway_grace_seconds",
            "recovery_seconds",
            "retry_after_seconds",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 0")
