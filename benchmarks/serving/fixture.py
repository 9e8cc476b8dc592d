"""What every system is given: a checkpoint, PEFT folders, and the same adapters in a real store."""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.hardware import ROOT
from benchmarks.kernels.models import SIZES, Size
from benchmarks.serving.progress import say
from benchmarks.store.process import StoreProcess
from common.channel import connect
from loraplex.requests import Upload
from loraplex.v1 import adapter_store_pb2 as pb
from loraplex.v1 import adapter_store_pb2_grpc, engine_pb2

# `make clean` removes it.
FOLDER = ROOT / "build" / "bench"
TENANT = "default"


@dataclass(frozen=True, slots=True)
class Fixture:
    """Files of one model. `fleet` is the data directory of a fleet whose store holds the adapters."""

    folder: Path
    model: str

    @property
    def size(self) -> Size:
        return SIZES[self.model]

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def adapters(self) -> Path:
        return self.folder / "adapters"

    @property
    def fleet(self) -> Path:
        return self.folder / "fleet"

    def peft_folder(self, index: int) -> Path:
        return self.adapters / f"adapter-{index:03d}"

    def fetched(self, index: int) -> engine_pb2.AdapterFetched:
        """What a worker's face tells its engine about an adapter of this store."""
        return engine_pb2.AdapterFetched.FromString((self.folder / "packed" / str(index)).read_bytes())


def prepare(model: str, num_adapters: int, folder: Path = FOLDER) -> Fixture:
    """Writes what is missing; a second call costs nothing."""
    from benchmarks.serving import models

    fixture = Fixture(folder / model, model)
    if not (fixture.base / "tokenizer.json").exists():
        say(f"{model}: writing the checkpoint")
        models.save_base(fixture.base, fixture.size)
    missing = [index for index in range(num_adapters) if not (fixture.folder / "packed" / str(index)).exists()]
    if missing:
        say(f"{model}: writing {len(missing)} adapters and packing them in a store")
        models.save_adapters(fixture.base, fixture.adapters, missing)
        _publish(fixture, missing)
    return fixture


def _publish(fixture: Fixture, indices: Sequence[int]) -> None:
    """Uploads to a real store and keeps the layouts it made, for engines that have no face."""
    store = fixture.fleet / "store"
    (fixture.folder / "packed").mkdir(exist_ok=True)
    with StoreProcess(store, "--model", str(fixture.base)) as process:
        asyncio.run(_upload(process.address, fixture, store, indices))


async def _upload(address: str, fixture: Fixture, store: Path, indices: Sequence[int]) -> None:
    async with connect(address) as channel:
        stub = adapter_store_pb2_grpc.AdapterStoreServiceStub(channel)
        for index in indices:
            upload = Upload(f"adapter-{index:03d}", fixture.peft_folder(index))
            answer = await stub.UploadAdapter(_as_tenant(upload))
            version = answer.adapter.adapter_version
            call = stub.FetchWeights(pb.FetchWeightsRequest(tenant=TENANT, adapter_version=version))
            first = await anext(aiter(call))
            call.cancel()
            path = store / "objects" / version / "packed.float32"
            fetched = engine_pb2.AdapterFetched(
                tenant=TENANT, adapter_version=version, path=str(path), layout=first.layout
            )
            (fixture.folder / "packed" / str(index)).write_bytes(fetched.SerializeToString())


def _as_tenant(upload: Upload) -> Iterator[pb.UploadAdapterRequest]:
    for message in upload.messages():
        if message.HasField("header"):
            message.header.tenant = TENANT
        yield message
