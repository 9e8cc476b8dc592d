"""Gives back an adapter's files as they were uploaded, and only if they are."""

import hashlib
import json
from collections.abc import Iterator

from adapter_store.blobs import Blobs
from adapter_store.convert import FILES, MAX_CHUNK_BYTES
from adapter_store.manifest import MANIFEST
from adapter_store.packed_reader import damaged
from adapter_store.registry import Version
from loraplex.v1 import adapter_store_pb2 as pb


def export_chunks(blobs: Blobs, version: Version) -> Iterator[pb.UploadChunk]:
    """Chunks of each file in turn. Blocks. Raises DataLoss before the end of a file that is damaged."""
    try:
        with blobs.open(version.digest, MANIFEST) as file:
            sha256: dict[str, str] = json.loads(file.read())["sha256"]
        for kind, name in FILES.items():
            if name in sha256:
                yield from _chunks(blobs, version, kind, name, sha256[name])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(version) from error


def _chunks(
    blobs: Blobs, version: Version, kind: "pb.AdapterFile.ValueType", name: str, sha256: str
) -> Iterator[pb.UploadChunk]:
    digest = hashlib.sha256()
    with blobs.open(version.digest, name) as file:
        data = file.read(MAX_CHUNK_BYTES)
        while True:
            digest.update(data)
            following = file.read(MAX_CHUNK_BYTES)
            if not following and digest.hexdigest() != sha256:
                raise damaged(version)
            yield pb.UploadChunk(file=kind, data=data)
            if not following:
                return
            data = following
