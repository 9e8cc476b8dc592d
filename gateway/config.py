"""Options of the gateway."""

from dataclasses import dataclass
from pathlib import Path

from common.config import ServiceConfig, option
from common.redis_client import RedisConfig
from gateway.quotas import Limits


@dataclass(frozen=True, kw_only=True)
class GatewayConfig(RedisConfig, ServiceConfig):
    """The door: checks requests, tokenises them, and streams the answers of the workers."""

    scheduler: str = option(help="HOST:PORT of the scheduler")
    adapter_store: str = option(help="HOST:PORT of the adapter store")
    tokenizer: Path | None = option(None, help="folder with tokenizer.json; the workers send theirs when it is absent")
    max_inflight_requests: int = option(4096, help="generate calls served at once; more are RESOURCE_EXHAUSTED")
    max_message_bytes: int = option(4 * 1024 * 1024, help="largest message taken from a client")
    max_request_seconds: float = option(
        1800.0,
        help="longest that a generate call may take, whatever its deadline; shorter than the store's delete grace",
    )
    scheduler_grace_seconds: float = option(
        5.0, help="how long requests that no worker has yet outlive a lost scheduler before they fail"
    )
    max_buffered_bytes: int = option(
        1024 * 1024, help="what one request may hold for a client that does not read; more ends the request"
    )
    write_stall_seconds: float = option(
        30.0, help="how long a client may leave a message unread before its request ends"
    )
    max_adapter_labels: int = option(50, help="adapters that metrics name; the others are counted as _other")
    max_tenant_labels: int = option(100, help="tenants that metrics name; the others are counted as _other")
    redis: str = option(
        "", help="redis://HOST:PORT/DB, rediss:// or unix://: gateways share quotas there; empty: each has its own"
    )
    tenant_requests_per_minute: int = option(
        0, help="generate calls that a tenant may start in a minute; 0: any number"
    )
    tenant_tokens_per_minute: int = option(
        0, help="tokens (prompt plus max_tokens) that a tenant may start in a minute; 0: any number"
    )

    def __post_init__(self) -> None:
        """Raises ValueError naming the option that is out of range."""
        RedisConfig.__post_init__(self)
        ServiceConfig.__post_init__(self)
        if self.tls_roles:
            raise ValueError("tls_roles is for the services behind the gateway, whose callers are known")
        if not self.max_request_seconds > 0:
            raise ValueError(f"max_request_seconds is {self.max_request_seconds}; it must be positive")
        for name in ("tenant_requests_per_minute", "tenant_tokens_per_minute"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")

    @property
    def quota(self) -> Limits:
        return Limits(self.tenant_requests_per_minute, self.tenant_tokens_per_minute)
