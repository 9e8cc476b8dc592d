"""Options and clients of Redis: fail fast, never retry by themselves, and keep passwords out of addresses."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from common.config import option


@dataclass(frozen=True, kw_only=True)
class RedisConfig:
    """Options of a service that may use Redis."""

    redis: str = option("", help="redis://HOST:PORT/DB, rediss:// or unix://; empty: none")
    redis_prefix: str = option("loraplex", help="what the names of all keys begin with")
    redis_timeout_seconds: float = option(0.15, help="what a caller waits for Redis at most, for one answer")
    redis_username: str = option("", help="ACL user; empty: the default user")
    redis_password_file: Path | None = option(None, help="file that holds the password of that user")
    redis_tls_ca: Path | None = option(None, help="PEM file of the authority that signed the server's certificate")
    redis_tls_cert: Path | None = option(None, help="PEM file of this client's certificate")
    redis_tls_key: Path | None = option(None, help="PEM file of this client's key")

    def __post_init__(self) -> None:
        """Raises ValueError naming the option that is out of range."""
        if not self.redis_timeout_seconds > 0:
            raise ValueError(f"redis_timeout_seconds is {self.redis_timeout_seconds}; it must be positive")
        if "@" in self.redis:
            raise ValueError("redis holds credentials; give them in redis_username and redis_password_file")

    @property
    def redis_address(self) -> "RedisAddress":
        return RedisAddress(
            self.redis,
            prefix=self.redis_prefix,
            timeout_seconds=self.redis_timeout_seconds,
            username=self.redis_username,
            password_file=self.redis_password_file,
            tls_ca=self.redis_tls_ca,
            tls_cert=self.redis_tls_cert,
            tls_key=self.redis_tls_key,
        )


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """Where Redis is and who we are to it. A password stands in a file, never in the address."""

    url: str
    prefix: str = "loraplex"
    # With all else a caller of a silent Redis hears of it within 0.2 s.
    timeout_seconds: float = 0.15
    username: str = ""
    password_file: Path | None = None
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None

    def client(self, timeout_seconds: float | None = None, observe: Callable[[float], object] | None = None) -> Any:
        """A client whose every command ends within the timeout, which is the address's unless another is given.

        `observe` is told the seconds of each command, also of one that fails; not of pipelines.
        Raises OSError when the password's file cannot be read, ValueError when the address is not one.
        """
        # The library's own default is ten retries, which take seconds.
        made: Any = Redis if observe is None else _timed(observe)
        return made.from_url(
            self.url,
            **self._options(),
            retry=Retry(NoBackoff(), 0),
            socket_timeout=timeout_seconds or self.timeout_seconds,
            socket_connect_timeout=self.timeout_seconds,
        )

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"decode_responses": True, "username": self.username or None}
        if self.password_file is not None:
            options["password"] = self.password_file.read_text(encoding="utf-8").rstrip("\n")
        if self.url.startswith("rediss:"):
            files = {"ssl_ca_certs": self.tls_ca, "ssl_certfile": self.tls_cert, "ssl_keyfile": self.tls_key}
            options |= {name: str(path) for name, path in files.items() if path is not None}
        return options


def _timed(observe: Callable[[float], object]) -> type[Redis]:
    class Timed(Redis):
        async def execute_command(self, *words: Any, **options: Any) -> Any:
            base: Any = super()
            begun = time.perf_counter()
            try:
                return await base.execute_command(*words, **options)
            finally:
                observe(time.perf_counter() - begun)

    return Timed
