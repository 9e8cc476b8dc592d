"""What every system is given: a checkpoint, PEFT folders, and the same adapters in a real store."""

import asyncio
import functools
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from benchmarks.hardware import ROOT
from benchmarks.kernels.models import SIZES, Size
from benchmarks.serving.progress import say
from benchmarks.serving.workload import Workload
from benchmarks.store.process import StoreProcess
from common.channel import connect
from common.wire import dtype_from_proto
from gpu_worker.config import EngineConfig
from gpu_worker.memory.geometry import PageGeometry
from loraplex.requests import Upload
from loraplex.v1 import adapter_store_pb2 as pb
from loraplex.v1 import adapter_store_pb2_grpc, engine_pb2

# `make clean` removes it.
FOLDER = ROOT / "build" / "bench"
TENANT = "default"


@dataclass(frozen=True, slots=True)
class Fixture:
    """Files of one model; `store` is the folder of an adapter store that holds the adapters."""

    folder: Path
    model: str
    size: Size

    @classmethod
    def of(cls, model: str, folder: Path = FOLDER) -> Self:
        """That of a model with a name. Raises KeyError."""
        return cls(folder / model, model, SIZES[model])

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def adapters(self) -> Path:
        return self.folder / "adapters"

    @property
    def store(self) -> Path:
        """Another one when the store's code changes: what it writes may have changed too."""
        return self.folder / f"store-{_store_fingerprint()}"

    def packed(self, index: int) -> Path:
        return self.store / "bench" / str(index)

    def peft_folder(self, index: int) -> Path:
        return self.adapters / f"adapter-{index:03d}"

    def fleet_data(self, name: str) -> Path:
        """A data directory for one fleet, whose store has the adapters by hard links: they are never written to."""
        data_dir = self.folder / name
        shutil.rmtree(data_dir, ignore_errors=True)
        shutil.copytree(self.store, data_dir / "store", copy_function=_link_large)
        return data_dir

    def fetched(self, index: int) -> engine_pb2.AdapterFetched:
        """What a worker's face tells its engine about an adapter of this store."""
        fetched = engine_pb2.AdapterFetched.FromString(self.packed(index).read_bytes())
        name = f"packed.{dtype_from_proto(fetched.layout.dtype)}"
        fetched.path = str(self.store / "objects" / fetched.adapter_version / name)
        return fetched


def prepare(fixture: Fixture, adapters: Sequence[int]) -> None:
    """Writes what is missing; a second call costs nothing."""
    from benchmarks.serving import models

    model = fixture.model
    if not (fixture.base / "tokenizer.json").exists():
        say(f"{model}: writing the checkpoint")
        models.save_base(fixture.base, fixture.size)
    if missing := [index for index in adapters if not (fixture.peft_folder(index) / "README.md").exists()]:
        say(f"{model}: writing {len(missing)} adapters")
        models.save_adapters(fixture.base, fixture.adapters, missing)
    if missing := [index for index in adapters if not fixture.packed(index).exists()]:
        say(f"{model}: packing {len(missing)} adapters in a store")
        for older in set(fixture.folder.glob("store-*")) - {fixture.store}:
            shutil.rmtree(older)
        _publish(fixture, missing)


def _publish(fixture: Fixture, indices: Sequence[int]) -> None:
    """Uploads to a real store and keeps the layouts it made, for engines that have no face."""
    fixture.packed(0).parent.mkdir(parents=True, exist_ok=True)
    with StoreProcess(fixture.store, "--model", str(fixture.base)) as process:
        asyncio.run(_upload(process.address, fixture, indices))


async def _upload(address: str, fixture: Fixture, indices: Sequence[int]) -> None:
    async with connect(address) as channel:
        stub = adapter_store_pb2_grpc.AdapterStoreServiceStub(channel)
        for index in indices:
            upload = Upload(f"adapter-{index:03d}", fixture.peft_folder(index))
            answer = await stub.UploadAdapter(_as_tenant(upload))
            version = answer.adapter.adapter_version
            call = stub.FetchWeights(pb.FetchWeightsRequest(tenant=TENANT, adapter_version=version))
            first = await anext(aiter(call))
            call.cancel()
            fetched = engine_pb2.AdapterFetched(tenant=TENANT, adapter_version=version, layout=first.layout)
            fixture.packed(index).write_bytes(fetched.SerializeToString())


@functools.cache
def _store_fingerprint() -> str:
    digest = hashlib.sha256((ROOT / "common" / "packing.py").read_bytes())
    for path in sorted((ROOT / "adapter_store").glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _link_large(source: str, destination: str) -> None:
    """Blobs are immutable; the small files beside them, the index among them, are copied."""
    if os.path.getsize(source) > 1 << 20 and not source.endswith((".sqlite", ".db")):
        os.link(source, destination)
    else:
        shutil.copyfile(source, destination)


def _as_tenant(upload: Upload) -> Iterator[pb.UploadAdapterRequest]:
    for message in upload.messages():
        if message.HasField("header"):
            message.header.tenant = TENANT
        yield message


def page_geometry(fixture: Fixture) -> PageGeometry:
    """Of an engine in float32 with its default page size."""
    size, config = fixture.size, EngineConfig(model=fixture.base)
    return PageGeometry(size.layers, size.kv_heads, size.head_dim, 4, config.page_size)


def slot_bytes(fixture: Fixture) -> int:
    """Of an adapter of the largest rank on all modules; every fourth one is that."""
    return fixture.fetched(3).layout.total_bytes


def pool_bytes(fixture: Fixture, workload: Workload, share_of_kv: float, num_adapters: int) -> tuple[int, int]:
    """Bytes of a pool, and of the adapters' part in it.

    The pool is the KV of the whole workload, every request at its full length, times `share_of_kv`, and the bytes of
    `num_adapters` adapters.
    """
    geometry = page_geometry(fixture)
    lengths = [len(request.prompt) + request.output_tokens for request in workload.requests]
    kv = sum(map(geometry.pages_for_tokens, lengths)) * geometry.page_bytes
    adapters = sum(
        geometry.pages_for_bytes(fixture.fetched(index).layout.total_bytes) * geometry.page_bytes
        for index in range(num_adapters)
    )
    return int(kv * share_of_kv) // geometry.page_bytes * geometry.page_bytes + adapters, adapters
