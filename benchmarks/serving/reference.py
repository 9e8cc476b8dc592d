"""The oracle's tokens, kept on disk: they depend on the files, the requests and three libraries alone."""

import functools
import hashlib
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from benchmarks.serving.fixture import Fixture
from benchmarks.serving.outcome import Tokens
from benchmarks.serving.workload import BASE, Workload

LIBRARIES = ("peft", "torch", "transformers")


def reference(fixture: Fixture, workload: Workload, ask: Callable[[], Tokens]) -> Tokens:
    """What PEFT answers to the workload; `ask` is called when nobody knows yet."""
    path = fixture.folder / "reference" / f"{_key(fixture, workload)}.json"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(ask()))
    return tuple(map(tuple, json.loads(path.read_text())))


@functools.cache
def _sha256(path: Path, changed: int) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _key(fixture: Fixture, workload: Workload) -> str:
    digest = hashlib.sha256()
    for path in (fixture.base / "config.json", fixture.base / "model.safetensors"):
        digest.update(_sha256(path, path.stat().st_mtime_ns))
    for request in workload.requests:
        adapter = "" if request.adapter == BASE else fixture.fetched(request.adapter).adapter_version
        digest.update(json.dumps([adapter, request.prompt, request.output_tokens]).encode())
    digest.update(json.dumps([version(library) for library in LIBRARIES]).encode())
    return digest.hexdigest()
