"""Options of the adapter store."""

from dataclasses import dataclass
from pathlib import Path

from common.config import ServiceConfig, option
from common.redis_client import RedisConfig


@dataclass(frozen=True, kw_only=True)
class StoreConfig(RedisConfig, ServiceConfig):
    """Keeps LoRA adapters and hands them to workers."""

    data_dir: Path = option(help="folder of the blobs and of the SQLite registry; created when missing")
    model: Path | None = option(None, help="checkpoint folder of the base model that shapes are checked against")
    model_name: str = option("", help="another name of the base model that adapters may have recorded")
    max_adapter_bytes: int = option(2 * 1024**3, help="largest weights file that is taken, in bytes")
    delete_grace_seconds: float = option(
        3600.0, help="how long the bytes of a deleted adapter stay; longer than any request of a gateway"
    )
    disk_reserve_bytes: int = option(256 * 1024**2, help="bytes of the disk that uploads leave free")
    tenant_max_adapters: int = option(0, help="most ids of one tenant; 0 sets no limit")
    tenant_max_bytes: int = option(0, help="most bytes on disk that the ids of one tenant point to; 0 sets no limit")
    redis: str = option(
        "", help="redis://HOST:PORT/DB, rediss:// or unix://; several stores may share a volume then; empty: SQLite"
    )

    def __post_init__(self) -> None:
        """Raises ValueError naming the option that is out of range."""
        RedisConfig.__post_init__(self)
        ServiceConfig.__post_init__(self)
        if self.max_adapter_bytes < 1:
            raise ValueError(f"max_adapter_bytes is {self.max_adapter_bytes}; it must be at least 1")
        if not self.delete_grace_seconds >= 0:
            raise ValueError(f"delete_grace_seconds is {self.delete_grace_seconds}; it must not be negative")
        for name in ("disk_reserve_bytes", "tenant_max_adapters", "tenant_max_bytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
