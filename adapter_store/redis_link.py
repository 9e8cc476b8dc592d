"""The connection to Redis: fails fast, never retries by itself, and types what the scripts take and give."""

import secrets
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from redis.exceptions import RedisError

from adapter_store import redis_scripts
from adapter_store.manifest import Record, version_from_json, version_to_json
from adapter_store.redis_scripts import SEPARATOR, Keys, id_key
from adapter_store.registry import Version
from common.redis_client import RedisAddress

# How long the follower waits for news before it looks whether Redis is still the one it knows.
FOLLOW_SECONDS = 0.5
# A follower that was away for more changes reads everything again.
KEPT_CHANGES = 10_000
_BATCH = 500
_ORPHAN_SECONDS = 600
_DATA_KEYS = ("aliases", "versions", "former", "releases")

Held = tuple[Record, float | None]


@dataclass(frozen=True, slots=True)
class RedisState:
    """Epoch and sequence as Redis has them; both empty when it has none."""

    epoch: str
    sequence: str

    @property
    def number(self) -> int:
        return int(self.sequence or 0)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything Redis knows, at one moment."""

    state: RedisState
    held: list[Held]
    versions: list[Version]


class RedisLink:
    """Every method raises redis.exceptions.RedisError or OSError, at the latest after the address's timeout."""

    def __init__(self, address: RedisAddress, observe: Callable[[float], object] | None = None) -> None:
        """`observe` is told the seconds of each command.

        Raises OSError when the password's file cannot be read, ValueError when the address is not one."""
        self.keys = Keys(address.prefix)
        self._client = address.client(observe=observe)
        self._follower = address.client(FOLLOW_SECONDS + address.timeout_seconds)
        self._change = self._client.register_script(redis_scripts.CHANGE)
        self._release = self._client.register_script(redis_scripts.RELEASE)
        self._forget = self._client.register_script(redis_scripts.FORGET)
        self._install = self._client.register_script(redis_scripts.INSTALL)

    async def close(self) -> None:
        for client in (self._client, self._follower):
            with suppress(RedisError, OSError):
                await client.aclose()

    async def state(self) -> RedisState:
        found: Any = await self._client.hmget(self.keys["state"], ["epoch", "sequence"])
        return RedisState(found[0] or "", found[1] or "")

    async def add_version(self, version: Version) -> None:
        await self._client.hset(self.keys["versions"], version.digest, version_to_json(version))

    async def change(self, known: RedisState, record: Record, expected: str | None) -> list[str]:
        """The answer of the CHANGE script; the record's own sequence is not used."""
        keys = self.keys.of("state", "aliases", "versions", "former", "releases", "changes")
        wanted = "*" if expected is None else expected
        key = id_key(record.tenant, record.adapter_id)
        arguments = [known.epoch, known.sequence, key, record.digest or "", wanted, repr(record.at), KEPT_CHANGES]
        answer: list[str] = await self._change(keys=keys, args=arguments)
        return answer

    async def release(self, before: float) -> None:
        while await self._release(keys=self.keys.of("former", "releases"), args=[repr(before)]):
            pass

    async def forget(self, known: RedisState, digest: str) -> bool:
        """False when something changed since `known`."""
        arguments = [known.epoch, known.sequence, digest]
        return bool(await self._forget(keys=self.keys.of("state", "versions"), args=arguments))

    async def changes(self, after: int, limit: int = 1000) -> list[Record]:
        """Changes after a sequence that the stream still has, in order."""
        entries = await self._client.xrange(self.keys["changes"], min=f"({after}-0", count=limit)
        return [_record(identifier, fields) for identifier, fields in entries]

    async def versions(self, digests: Iterable[str]) -> list[Version]:
        wanted = list(digests)
        if not wanted:
            return []
        found: Any = await self._client.hmget(self.keys["versions"], wanted)
        return [version_from_json(record) for record in found if record is not None]

    async def news(self, after: int) -> None:
        """Returns when there is a change after a sequence, or after a while."""
        block = round(FOLLOW_SECONDS * 1000)
        await self._follower.xread({self.keys["changes"]: f"{after}-0"}, count=1, block=block)

    async def snapshot(self) -> Snapshot | None:
        """None when something changed while it was read."""
        before = await self.state()
        held: list[Held] = []
        async for key, value in self._client.hscan_iter(self.keys["aliases"], count=_BATCH):
            tenant, adapter_id = key.split(SEPARATOR)
            digest, sequence, at = value.split(" ")
            held.append((Record(int(sequence), tenant, adapter_id, digest, float(at)), None))
        releases = self._client.zscan_iter(self.keys["releases"], count=_BATCH)
        released: dict[str, float] = {key: score async for key, score in releases}
        async for key, value in self._client.hscan_iter(self.keys["former"], count=_BATCH):
            tenant, adapter_id, digest = key.split(SEPARATOR)
            sequence, at = value.split(" ")
            record = Record(int(sequence), tenant, adapter_id, digest, float(at))
            held.append((record, released.get(key, 0.0)))
        versions = [
            version_from_json(record)
            async for _, record in self._client.hscan_iter(self.keys["versions"], count=_BATCH)
        ]
        return Snapshot(before, held, versions) if await self.state() == before else None

    async def install(self, seen: RedisState, new: RedisState, held: list[Held], versions: list[Version]) -> bool:
        """Makes Redis hold exactly this, in one step; False when its state is no longer `seen`."""
        token = f"new:{secrets.token_hex(8)}"
        aliases = {
            id_key(record.tenant, record.adapter_id): f"{record.digest} {record.sequence} {record.at!r}"
            for record, released_at in held
            if released_at is None
        }
        former, releases = {}, {}
        for record, released_at in held:
            if released_at is not None:
                key = SEPARATOR.join((record.tenant, record.adapter_id, record.digest or ""))
                former[key], releases[key] = f"{record.sequence} {record.at!r}", released_at
        by_digest = {version.digest: version_to_json(version) for version in versions}
        for name, fields in (("aliases", aliases), ("versions", by_digest), ("former", former)):
            await self._fill(self.keys[f"{token}:{name}"], fields, {})
        await self._fill(self.keys[f"{token}:releases"], {}, releases)
        keys = self.keys.of("state", *_DATA_KEYS, "changes", *(f"{token}:{name}" for name in _DATA_KEYS))
        arguments = [seen.epoch, seen.sequence, new.epoch, new.sequence]
        return bool(await self._install(keys=keys, args=arguments))

    async def _fill(self, key: str, fields: dict[str, str], scores: dict[str, float]) -> None:
        """Writes a hash or a sorted set in batches; it goes by itself if it is never put in place."""
        for batch in _batches(fields):
            await self._client.hset(key, mapping=batch)
        for batch in _batches(scores):
            await self._client.zadd(key, batch)
        if fields or scores:
            await self._client.expire(key, _ORPHAN_SECONDS)


def _record(identifier: str, fields: dict[str, str]) -> Record:
    tenant, adapter_id = fields["key"].split(SEPARATOR)
    return Record(int(identifier.partition("-")[0]), tenant, adapter_id, fields["digest"] or None, float(fields["at"]))


def _batches(items: dict[str, Any]) -> Iterable[dict[str, Any]]:
    pairs = list(items.items())
    return (dict(pairs[start : start + _BATCH]) for start in range(0, len(pairs), _BATCH))
