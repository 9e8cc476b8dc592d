"""The registry in one SQLite file, for a store that is alone on its folder.

One thread owns the connection, so the event loop never waits for the disk and every call is a transaction.
"""

import asyncio
import json
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from adapter_store.registry import (
    ABSENT,
    Alias,
    Change,
    Changes,
    ModuleEffect,
    Totals,
    Version,
    WrongVersionError,
)
from common.errors import Unavailable

_Result = TypeVar("_Result")

# A watcher that was away for more removals than this starts over.
KEPT_REMOVALS = 10_000

# `released_at` is null while the id points to the version. A removal is kept so that a watcher can hear of it later;
# `state` has the last sequence given out and the last one of which a removal was dropped.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS versions (
    digest TEXT PRIMARY KEY, stored_bytes INTEGER NOT NULL, record TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS aliases (
    tenant TEXT NOT NULL, adapter_id TEXT NOT NULL, digest TEXT NOT NULL REFERENCES versions,
    created_at REAL NOT NULL, sequence INTEGER NOT NULL, released_at REAL,
    PRIMARY KEY (tenant, adapter_id, digest)
) WITHOUT ROWID;
CREATE UNIQUE INDEX IF NOT EXISTS current ON aliases (tenant, adapter_id) WHERE released_at IS NULL;
CREATE INDEX IF NOT EXISTS held ON aliases (digest);
CREATE INDEX IF NOT EXISTS put_order ON aliases (sequence) WHERE released_at IS NULL;
CREATE TABLE IF NOT EXISTS removals (
    tenant TEXT NOT NULL, adapter_id TEXT NOT NULL, sequence INTEGER NOT NULL,
    PRIMARY KEY (tenant, adapter_id)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS removal_order ON removals (sequence);
CREATE TABLE IF NOT EXISTS state (
    one INTEGER PRIMARY KEY CHECK (one = 1), sequence INTEGER NOT NULL, dropped INTEGER NOT NULL
);
INSERT OR IGNORE INTO state VALUES (1, 0, 0);
"""

_ALIAS = "SELECT tenant, adapter_id, record, created_at, sequence FROM aliases JOIN versions USING (digest) "


class SqliteRegistry:
    """Implements `Registry`."""

    def __init__(self, path: Path, kept_removals: int = KEPT_REMOVALS) -> None:
        self._path = path
        self._kept_removals = kept_removals
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="registry")
        self._newest = 0
        self._stopped = False
        self._changed = asyncio.Event()

    async def open(self) -> None:
        """Opens or makes the file. Raises OSError when it cannot."""
        try:
            self._newest = await asyncio.get_running_loop().run_in_executor(self._thread, self._open)
        except sqlite3.DatabaseError as error:
            self._thread.shutdown()
            raise OSError(f"cannot open {self._path}: {error}") from error

    async def close(self) -> None:
        self.stop_waiting()
        await self._run(self._db.close)
        self._thread.shutdown()

    async def add_version(self, version: Version) -> None:
        record = json.dumps(asdict(version))
        statement = "INSERT OR IGNORE INTO versions VALUES (?, ?, ?)"
        await self._run(lambda: self._db.execute(statement, (version.digest, version.stored_bytes, record)))

    async def point(self, tenant: str, adapter_id: str, digest: str, *, expected: str | None, now: float) -> Alias:
        alias = await self._run(lambda: self._point(tenant, adapter_id, digest, expected, now))
        self._wake(alias.sequence)
        return alias

    async def remove(self, tenant: str, adapter_id: str, *, expected: str | None, now: float) -> str:
        digest, sequence = await self._run(lambda: self._remove(tenant, adapter_id, expected, now))
        self._wake(sequence)
        return digest

    async def get(self, tenant: str, adapter_id: str, digest: str = "") -> Alias | None:
        which = "digest = ?" if digest else "? = '' AND released_at IS NULL"
        return await self._run(lambda: self._one(tenant, adapter_id, f"AND {which}", digest))

    async def held(self, tenant: str, digest: str) -> Version | None:
        query = "SELECT record FROM versions WHERE digest = ? AND EXISTS "
        query += "(SELECT 1 FROM aliases WHERE aliases.digest = versions.digest AND tenant = ?)"
        row = await self._run(lambda: self._db.execute(query, (digest, tenant)).fetchone())
        return None if row is None else _version(row[0])

    async def page(self, tenant: str, *, after: str, limit: int) -> list[Alias]:
        query = _ALIAS + "WHERE tenant = ? AND adapter_id > ? AND released_at IS NULL ORDER BY adapter_id LIMIT ?"
        rows = await self._run(lambda: self._db.execute(query, (tenant, after, limit)).fetchall())
        return [_alias(row) for row in rows]

    async def changes(self, tenant: str, after: int) -> Changes:
        return await self._run(lambda: self._changes(tenant, after))

    async def wait(self, after: int) -> None:
        while self._newest <= after:
            if self._stopped:
                raise Unavailable("STOPPING", "the adapter store is stopping", retry_after_seconds=1.0)
            await self._changed.wait()

    def stop_waiting(self) -> None:
        self._stopped = True
        self._changed.set()

    async def release(self, before: float) -> None:
        statement = "DELETE FROM aliases WHERE released_at <= ?"
        await self._run(lambda: self._db.execute(statement, (before,)))

    async def garbage(self) -> list[str]:
        query = "SELECT digest FROM versions WHERE digest NOT IN (SELECT digest FROM aliases)"
        return [row[0] for row in await self._run(lambda: self._db.execute(query).fetchall())]

    async def forget(self, digest: str) -> None:
        await self._run(lambda: self._db.execute("DELETE FROM versions WHERE digest = ?", (digest,)))

    async def totals(self) -> Totals:
        query = "SELECT (SELECT count(*) FROM aliases WHERE released_at IS NULL), "
        query += "(SELECT coalesce(sum(stored_bytes), 0) FROM versions)"
        return Totals(*await self._run(lambda: self._db.execute(query).fetchone()))

    async def _run(self, call: Callable[[], _Result]) -> _Result:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, call)
        except sqlite3.OperationalError as error:
            message = "the adapter store's registry does not answer"
            raise Unavailable("REGISTRY_UNAVAILABLE", message, retry_after_seconds=1.0) from error

    def _wake(self, sequence: int) -> None:
        if sequence > self._newest:
            self._newest = sequence
            self._changed.set()
            self._changed = asyncio.Event()

    def _open(self) -> int:
        self._db = sqlite3.connect(self._path, isolation_level=None)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("PRAGMA foreign_keys = ON")
        self._db.executescript(_SCHEMA)
        return self._state()[0]

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def _point(self, tenant: str, adapter_id: str, digest: str, expected: str | None, now: float) -> Alias:
        with self._transaction():
            current = self._compare(tenant, adapter_id, expected)
            if current is None or current.version.digest != digest:
                sequence = self._next_sequence()
                self._release(tenant, adapter_id, now)
                self._db.execute("DELETE FROM removals WHERE tenant = ? AND adapter_id = ?", (tenant, adapter_id))
                self._db.execute(
                    "INSERT OR REPLACE INTO aliases VALUES (?, ?, ?, ?, ?, NULL)",
                    (tenant, adapter_id, digest, now, sequence),
                )
                current = self._one(tenant, adapter_id, "AND digest = ?", digest)
        if current is None:
            raise AssertionError("the row was just written")
        return current

    def _remove(self, tenant: str, adapter_id: str, expected: str | None, now: float) -> tuple[str, int]:
        with self._transaction():
            current = self._compare(tenant, adapter_id, expected)
            if current is None:
                raise WrongVersionError(None)
            sequence = self._next_sequence()
            self._release(tenant, adapter_id, now)
            self._db.execute("INSERT OR REPLACE INTO removals VALUES (?, ?, ?)", (tenant, adapter_id, sequence))
            self._drop_old_removals()
        return current.version.digest, sequence

    def _compare(self, tenant: str, adapter_id: str, expected: str | None) -> Alias | None:
        current = self._one(tenant, adapter_id, "AND ? = '' AND released_at IS NULL", "")
        digest = ABSENT if current is None else current.version.digest
        if expected is not None and expected != digest:
            raise WrongVersionError(digest or None)
        return current

    def _release(self, tenant: str, adapter_id: str, now: float) -> None:
        statement = "UPDATE aliases SET released_at = ? WHERE tenant = ? AND adapter_id = ? AND released_at IS NULL"
        self._db.execute(statement, (now, tenant, adapter_id))

    def _drop_old_removals(self) -> None:
        query = "SELECT sequence FROM removals ORDER BY sequence DESC LIMIT 1 OFFSET ?"
        row = self._db.execute(query, (self._kept_removals,)).fetchone()
        if row is not None:
            self._db.execute("DELETE FROM removals WHERE sequence <= ?", row)
            self._db.execute("UPDATE state SET dropped = ?", row)

    def _changes(self, tenant: str, after: int) -> Changes:
        with self._transaction():
            newest, dropped = self._state()
            resync = after > newest or 0 < after < dropped
            after = 0 if resync else after
            whose, values = ("AND tenant = ? ", (after, tenant)) if tenant else ("", (after,))
            puts = _ALIAS + f"WHERE sequence > ? {whose}AND released_at IS NULL"
            changes = [
                Change(alias.sequence, alias.tenant, alias.adapter_id, alias)
                for alias in map(_alias, self._db.execute(puts, values))
            ]
            if after > 0:
                removals = f"SELECT sequence, tenant, adapter_id, NULL FROM removals WHERE sequence > ? {whose}"
                changes += [Change(*row) for row in self._db.execute(removals, values)]
        changes.sort(key=lambda change: change.sequence)
        return Changes(tuple(changes), newest, resync)

    def _one(self, tenant: str, adapter_id: str, condition: str, value: str) -> Alias | None:
        query = _ALIAS + "WHERE tenant = ? AND adapter_id = ? " + condition
        row = self._db.execute(query, (tenant, adapter_id, value)).fetchone()
        return None if row is None else _alias(row)

    def _state(self) -> tuple[int, int]:
        newest, dropped = self._db.execute("SELECT sequence, dropped FROM state").fetchone()
        return newest, dropped

    def _next_sequence(self) -> int:
        self._db.execute("UPDATE state SET sequence = sequence + 1")
        return self._state()[0]


def _version(record: str) -> Version:
    fields = json.loads(record)
    modules = tuple(ModuleEffect(**module) for module in fields.pop("modules"))
    return Version(**fields, modules=modules)


def _alias(row: tuple[str, str, str, float, int]) -> Alias:
    tenant, adapter_id, record, created_at, sequence = row
    return Alias(tenant, adapter_id, _version(record), created_at, sequence)
