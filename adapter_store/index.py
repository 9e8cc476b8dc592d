"""An index over the manifest in one SQLite file: what is asked often, answered in microseconds.

Losing it loses nothing. One thread opens it and makes all calls.
"""

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from adapter_store.manifest import Record, version_from_json, version_to_json
from adapter_store.registry import ABSENT, Alias, Change, Changes, Totals, Version, WrongVersionError

# A watcher that was away for more removals than this starts over.
KEPT_REMOVALS = 10_000

# `released_at` is null while the id points to the version. A removal is kept so that a watcher can hear of it later;
# `state` has the last sequence given out, the last one of which a removal was dropped, and whose sequences they are.
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
DROP INDEX IF EXISTS held;
CREATE INDEX IF NOT EXISTS holders ON aliases (digest, tenant);
CREATE INDEX IF NOT EXISTS put_order ON aliases (sequence) WHERE released_at IS NULL;
CREATE TABLE IF NOT EXISTS removals (
    tenant TEXT NOT NULL, adapter_id TEXT NOT NULL, sequence INTEGER NOT NULL,
    PRIMARY KEY (tenant, adapter_id)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS removal_order ON removals (sequence);
CREATE TABLE IF NOT EXISTS state (
    one INTEGER PRIMARY KEY CHECK (one = 1), sequence INTEGER NOT NULL, dropped INTEGER NOT NULL, epoch TEXT NOT NULL
);
INSERT OR IGNORE INTO state VALUES (1, 0, 0, '');
"""

# A cross join is made in its order: what the tenant has is looked for first, and a version only after that. Otherwise
# one that exists for others would cost a step more than one that nobody has.
_JOIN = "FROM aliases CROSS JOIN versions USING (digest) "
_ALIAS = f"SELECT tenant, adapter_id, record, created_at, sequence {_JOIN}"


@dataclass(frozen=True, slots=True)
class IndexState:
    """The last change taken in, the last one before which removals are not known, and whose sequences they are."""

    sequence: int
    dropped: int
    epoch: str


class Index:
    """Every method raises sqlite3.Error when the file does not do."""

    def __init__(self, path: Path, kept_removals: int = KEPT_REMOVALS) -> None:
        self._path = path
        self._kept_removals = kept_removals

    def open(self) -> None:
        self.db = sqlite3.connect(self._path, isolation_level=None)
        self.db.execute("PRAGMA journal_mode = WAL")
        # What a power cut takes from the index is still in the manifest.
        self.db.execute("PRAGMA synchronous = NORMAL")
        self.db.execute("PRAGMA foreign_keys = ON")
        self.db.executescript(_SCHEMA)

    def close(self) -> None:
        self.db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        self.db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.db.execute("COMMIT")
        except BaseException:
            if self.db.in_transaction:
                self.db.execute("ROLLBACK")
            raise

    def state(self) -> IndexState:
        return IndexState(*self.db.execute("SELECT sequence, dropped, epoch FROM state").fetchone())

    def add_versions(self, versions: Iterable[Version]) -> None:
        rows = [(version.digest, version.stored_bytes, version_to_json(version)) for version in versions]
        self.db.executemany("INSERT OR IGNORE INTO versions VALUES (?, ?, ?)", rows)

    def forget(self, digest: str) -> None:
        self.db.execute("DELETE FROM versions WHERE digest = ?", (digest,))

    def knows(self, digest: str) -> bool:
        return self.db.execute("SELECT 1 FROM versions WHERE digest = ?", (digest,)).fetchone() is not None

    def digests(self) -> set[str]:
        return {row[0] for row in self.db.execute("SELECT digest FROM versions")}

    def compare(self, tenant: str, adapter_id: str, expected: str | None) -> Alias | None:
        """What the id points to. Raises WrongVersionError when that is not `expected`; None expects anything."""
        current = self.get(tenant, adapter_id)
        digest = ABSENT if current is None else current.version.digest
        if expected is not None and expected != digest:
            raise WrongVersionError(digest or None)
        return current

    def apply(self, record: Record) -> None:
        """Takes in the next change; an id that points to a version nobody knows is taken for removed."""
        key = record.tenant, record.adapter_id
        statement = "UPDATE aliases SET released_at = ? WHERE tenant = ? AND adapter_id = ? AND released_at IS NULL"
        self.db.execute(statement, (record.at, *key))
        if record.digest is not None and self.knows(record.digest):
            self.db.execute("DELETE FROM removals WHERE tenant = ? AND adapter_id = ?", key)
            row = (*key, record.digest, record.at, record.sequence)
            self.db.execute("INSERT OR REPLACE INTO aliases VALUES (?, ?, ?, ?, ?, NULL)", row)
        else:
            self.db.execute("INSERT OR REPLACE INTO removals VALUES (?, ?, ?)", (*key, record.sequence))
            self._drop_old_removals()
        self.db.execute("UPDATE state SET sequence = ?", (record.sequence,))

    def clear(self) -> None:
        """Forgets everything but the sequence, from which watchers must start over."""
        for table in ("aliases", "removals", "versions"):
            self.db.execute(f"DELETE FROM {table}")
        self.db.execute("UPDATE state SET dropped = sequence")

    def add_former(self, record: Record, released_at: float) -> None:
        """An id and a version it pointed to until `released_at`."""
        row = record.tenant, record.adapter_id, record.digest, record.at, record.sequence, released_at
        if record.digest is not None and self.knows(record.digest):
            self.db.execute("INSERT OR REPLACE INTO aliases VALUES (?, ?, ?, ?, ?, ?)", row)

    def adopt(self, epoch: str, sequence: int) -> None:
        """From here on sequences are those of `epoch`; watchers of earlier ones start over."""
        self.db.execute("UPDATE state SET sequence = ?, dropped = ?, epoch = ?", (sequence, sequence, epoch))

    def get(self, tenant: str, adapter_id: str, digest: str = "") -> Alias | None:
        which = "digest = ?" if digest else "? = '' AND released_at IS NULL"
        query = _ALIAS + f"WHERE tenant = ? AND adapter_id = ? AND {which}"
        row = self.db.execute(query, (tenant, adapter_id, digest)).fetchone()
        return None if row is None else _alias(row)

    def held(self, tenant: str, digest: str) -> Version | None:
        query = f"SELECT record {_JOIN}WHERE digest = ? AND tenant = ? LIMIT 1"
        row = self.db.execute(query, (digest, tenant)).fetchone()
        return None if row is None else version_from_json(row[0])

    def page(self, tenant: str, after: str, limit: int) -> list[Alias]:
        query = _ALIAS + "WHERE tenant = ? AND adapter_id > ? AND released_at IS NULL ORDER BY adapter_id LIMIT ?"
        return [_alias(row) for row in self.db.execute(query, (tenant, after, limit)).fetchall()]

    def changes(self, tenant: str, after: int) -> Changes:
        with self.transaction():
            state = self.state()
            resync = after > state.sequence or 0 < after < state.dropped
            after = 0 if resync else after
            whose, values = ("AND tenant = ? ", (after, tenant)) if tenant else ("", (after,))
            puts = _ALIAS + f"WHERE sequence > ? {whose}AND released_at IS NULL"
            changes = [
                Change(alias.sequence, alias.tenant, alias.adapter_id, alias)
                for alias in map(_alias, self.db.execute(puts, values))
            ]
            if after > 0:
                removals = f"SELECT sequence, tenant, adapter_id, NULL FROM removals WHERE sequence > ? {whose}"
                changes += [Change(*row) for row in self.db.execute(removals, values)]
        changes.sort(key=lambda change: change.sequence)
        return Changes(tuple(changes), state.sequence, resync)

    def rows(self) -> Iterator[tuple[Record, float | None]]:
        """Every id and version it points to, or pointed to until the time beside it."""
        query = "SELECT sequence, tenant, adapter_id, digest, created_at, released_at FROM aliases"
        for *fields, released_at in self.db.execute(query):
            yield Record(*fields), released_at

    def needed_sequences(self) -> set[int]:
        """Changes from which the index can be made again."""
        query = "SELECT sequence FROM aliases UNION SELECT sequence FROM removals UNION SELECT sequence FROM state"
        return {row[0] for row in self.db.execute(query)}

    def first_former_sequence(self) -> int:
        """Changes after it may end a hold; without a hold that has ended it is the newest."""
        first = "(SELECT min(sequence) FROM aliases WHERE released_at IS NOT NULL)"
        return int(self.db.execute(f"SELECT coalesce({first}, sequence) FROM state").fetchone()[0])

    def release(self, before: float) -> int:
        """Ends the hold of ids on versions they stopped pointing to at or before that time; returns how many."""
        return self.db.execute("DELETE FROM aliases WHERE released_at <= ?", (before,)).rowcount

    def garbage(self) -> list[str]:
        query = "SELECT digest FROM versions WHERE digest NOT IN (SELECT digest FROM aliases)"
        return [row[0] for row in self.db.execute(query)]

    def totals(self, tenant: str = "") -> Totals:
        """Of one tenant, or of all: then with the bytes of versions that nobody holds."""
        if tenant:
            held = "SELECT count(*), coalesce(sum(stored_bytes), 0) FROM aliases JOIN versions USING (digest) "
            return Totals(*self.db.execute(held + "WHERE tenant = ? AND released_at IS NULL", (tenant,)).fetchone())
        query = "SELECT (SELECT count(*) FROM aliases WHERE released_at IS NULL), "
        return Totals(*self.db.execute(query + "(SELECT coalesce(sum(stored_bytes), 0) FROM versions)").fetchone())

    def _drop_old_removals(self) -> None:
        query = "SELECT sequence FROM removals ORDER BY sequence DESC LIMIT 1 OFFSET ?"
        row = self.db.execute(query, (self._kept_removals,)).fetchone()
        if row is not None:
            self.db.execute("DELETE FROM removals WHERE sequence <= ?", row)
            self.db.execute("UPDATE state SET dropped = ?", row)


def _alias(row: tuple[str, str, str, float, int]) -> Alias:
    tenant, adapter_id, record, created_at, sequence = row
    return Alias(tenant, adapter_id, version_from_json(record), created_at, sequence)
