"""The metadata of the store: which id of which tenant points to which version, and in what order that changed.

    (tenant, adapter_id) --points to--> version --has--> object on disk
                  \\--pointed to, until the grace is over--> version

A version is held by a tenant while one of its ids points to it, and for the grace after that; an object is garbage
when nobody holds its version.
"""

from dataclasses import dataclass
from typing import Protocol

# Instead of a version: the id must not exist.
ABSENT = ""


@dataclass(frozen=True, slots=True)
class ModuleEffect:
    """What a version does to one module over all layers."""

    module: str
    num_layers: int
    min_lora_rank: int
    max_lora_rank: int
    parameter_bytes: int
    delta_norm: float


@dataclass(frozen=True, slots=True)
class Version:
    """An immutable adapter, whoever points to it. `stored_bytes` is what its object takes on disk."""

    digest: str
    base_model: str
    dtype: str
    packed_bytes: int
    stored_bytes: int
    max_lora_rank: int
    modules: tuple[ModuleEffect, ...]
    chat_template: str


@dataclass(frozen=True, slots=True)
class Alias:
    """One id of a tenant and a version it points to, or pointed to."""

    tenant: str
    adapter_id: str
    version: Version
    # Seconds since the Unix epoch.
    created_at: float
    sequence: int


@dataclass(frozen=True, slots=True)
class Change:
    """The latest change of one id; without an alias the id was removed."""

    sequence: int
    tenant: str
    adapter_id: str
    alias: Alias | None


@dataclass(frozen=True, slots=True)
class Changes:
    """What changed, by sequence, up to and including `through`. `resync`: forget what was known before."""

    changes: tuple[Change, ...]
    through: int
    resync: bool


@dataclass(frozen=True, slots=True)
class Totals:
    """Ids that point to a version, and bytes on disk of all versions."""

    adapters: int
    stored_bytes: int


class WrongVersionError(Exception):
    """A compare-and-set lost; `current` is what the id points to, None when it does not exist."""

    def __init__(self, current: str | None) -> None:
        super().__init__(current)
        self.current = current


class Registry(Protocol):
    """Every change takes the next sequence number. Raises Unavailable when the metadata cannot be reached."""

    def check_writable(self) -> None:
        """Raises Unavailable when a change would be refused now; for who has much to do before it asks for one."""

    async def add_version(self, version: Version) -> None:
        """Makes a version known and nobody's. Adding it again is a no-op."""

    async def point(self, tenant: str, adapter_id: str, digest: str, *, expected: str | None, now: float) -> Alias:
        """Points an id to a known version; pointing it where it points already changes nothing.

        `expected` is the version it must point to, ABSENT, or None for any. Raises WrongVersionError otherwise.
        """

    async def remove(self, tenant: str, adapter_id: str, *, expected: str | None, now: float) -> str:
        """Removes an id; returns the version it pointed to. Raises WrongVersionError as `point` does; an id that does
        not exist is one, with `current` None."""

    async def get(self, tenant: str, adapter_id: str, digest: str = "") -> Alias | None:
        """What the id points to now, or the given version if the id points to it or did within the grace."""

    async def held(self, tenant: str, digest: str) -> Version | None:
        """The version, if the tenant holds it."""

    async def page(self, tenant: str, *, after: str, limit: int) -> list[Alias]:
        """Ids that sort after `after`, in order."""

    async def changes(self, tenant: str, after: int) -> Changes:
        """The latest change of each id since the sequence `after`; 0 gives every id. An empty tenant means all.

        When what was missed is no longer known, `resync` is set and every id is given.
        """

    async def wait(self, after: int) -> None:
        """Returns once something changed after the sequence `after`. Raises Unavailable after `stop_waiting`."""

    def stop_waiting(self) -> None:
        """Ends all present and future waits."""

    async def refresh(self) -> None:
        """Takes in what other stores changed."""

    async def release(self, before: float) -> None:
        """Ends the hold of ids on versions they no longer point to since before that time."""

    async def garbage(self) -> list[str]:
        """Versions that nobody holds."""

    async def forget(self, digest: str) -> bool:
        """Removes a version that nobody holds; false when somebody changed something meanwhile."""

    async def totals(self, tenant: str = "") -> Totals:
        """Of one tenant: what its ids point to, counted for each id. Empty: ids of all, and versions stored."""

    async def open(self) -> None:
        """Raises OSError when the registry cannot be had."""

    async def close(self) -> None: ...
