"""The manifest on disk: what every index of the store can be made from again.

    data_dir/objects/DIGEST/manifest.json     what one version is, and the sha256 of its files
    data_dir/journal/00000000000000000042     the change with sequence 42: {"tenant", "adapter_id", "digest", "at"}

A change is a file of its own, written under another name and linked to its sequence: it is there whole or not at all,
and no sequence is ever used twice, whoever hands sequences out.
"""

import json
import os
import secrets
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from adapter_store.disk import create, disk_errors, open_existing, sync_folder, write_all
from adapter_store.names import is_digest
from adapter_store.registry import ModuleEffect, Version

MANIFEST = "manifest.json"
_NAME_DIGITS = 20


@dataclass(frozen=True, slots=True)
class Record:
    """One change: since `at`, seconds since the Unix epoch, the id points to `digest`; None means it is removed."""

    sequence: int
    tenant: str
    adapter_id: str
    digest: str | None
    at: float


class SequenceUsedError(Exception):
    """Another change has this sequence: whoever handed it out has forgotten some."""


@dataclass(frozen=True, slots=True)
class PendingRecord:
    """A change that is durable and has no sequence yet."""

    path: Path
    journal: Path

    def __enter__(self) -> "PendingRecord":
        return self

    def __exit__(self, *error: object) -> None:
        self.discard()

    def discard(self) -> None:
        """Removes what was not committed."""
        self.path.unlink(missing_ok=True)

    def commit(self, sequence: int) -> None:
        """Makes it the change with this sequence, durably. Raises SequenceUsedError; the same change again is fine."""
        target = self.journal / _file_name(sequence)
        with disk_errors():
            try:
                os.link(self.path, target)
            except FileExistsError:
                if target.read_bytes() != self.path.read_bytes():
                    raise SequenceUsedError(sequence) from None
            sync_folder(self.journal)


class Manifest:
    """The manifest of one volume. Everything here may block: call it from a thread."""

    def __init__(self, data_dir: Path, staging: Path) -> None:
        """`staging` is a folder of this process on the same volume; a start empties it."""
        self._objects, self._journal = data_dir / "objects", data_dir / "journal"
        self._staging = staging

    def start(self) -> None:
        self._journal.mkdir(mode=0o700, parents=True, exist_ok=True)

    def prepare(self, tenant: str, adapter_id: str, digest: str | None, at: float) -> PendingRecord:
        """A change to commit and then to discard. Raises ResourceExhausted when the disk is full."""
        pending = PendingRecord(self._staging / f"record-{secrets.token_hex(16)}", self._journal)
        fields = {"tenant": tenant, "adapter_id": adapter_id, "digest": digest, "at": at}
        try:
            with disk_errors(), create(pending.path) as file:
                write_all(file, json.dumps(fields).encode())
                os.fsync(file.fileno())
        except BaseException:
            pending.discard()
            raise
        return pending

    def ensure(self, records: Iterable[Record]) -> None:
        """Adds changes that whoever made them did not live to write. Raises SequenceUsedError."""
        for record in records:
            if not (self._journal / _file_name(record.sequence)).exists():
                with self.prepare(record.tenant, record.adapter_id, record.digest, record.at) as pending:
                    pending.commit(record.sequence)
            elif self._record(record.sequence) != record:
                raise SequenceUsedError(record.sequence)

    def sequences(self) -> list[int]:
        """Of all changes, sorted."""
        return sorted(int(name) for name in os.listdir(self._journal))

    def newest(self) -> int:
        """The last sequence, 0 when there is none."""
        return max(self.sequences(), default=0)

    def read(self, after: int = 0) -> list[Record]:
        """Changes after a sequence, in order."""
        return [self._record(sequence) for sequence in self.sequences() if sequence > after]

    def forget(self, sequences: Iterable[int]) -> None:
        """Removes changes that no longer matter; missing ones are fine."""
        for sequence in sequences:
            (self._journal / _file_name(sequence)).unlink(missing_ok=True)

    def digests(self) -> set[str]:
        """Of all objects."""
        return {name for name in os.listdir(self._objects) if is_digest(name)}

    def versions(self, digests: Iterable[str]) -> list[Version]:
        """Versions by digest; one whose object or manifest is missing or damaged is left out."""
        return [version for digest in digests if (version := self._version(digest)) is not None]

    def _version(self, digest: str) -> Version | None:
        try:
            with open_existing(self._objects / digest / MANIFEST) as file:
                return version_from_json(json.dumps(json.loads(file.read())["version"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _record(self, sequence: int) -> Record:
        with open_existing(self._journal / _file_name(sequence)) as file:
            return Record(sequence, **json.loads(file.read()))


def write_version(directory: Path, version: Version, sha256: dict[str, str]) -> None:
    """Writes the manifest of one version into its staged folder, durably."""
    with disk_errors(), create(directory / MANIFEST) as file:
        write_all(file, json.dumps({"version": asdict(version), "sha256": sha256}).encode())
        os.fsync(file.fileno())


def version_to_json(version: Version) -> str:
    return json.dumps(asdict(version))


def version_from_json(record: str) -> Version:
    fields = json.loads(record)
    modules = tuple(ModuleEffect(**module) for module in fields.pop("modules"))
    return Version(**fields, modules=modules)


def _file_name(sequence: int) -> str:
    return f"{sequence:0{_NAME_DIGITS}d}"
