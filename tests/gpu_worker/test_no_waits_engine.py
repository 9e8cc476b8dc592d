"""The whole step asks the device for nothing: commands, batches, loads and messages are made of what the host knows.

As in `test_no_waits`, everything on the device is a fake tensor, the pool included: who asks for a number fails. The
one place that may wait, the copy of a step's draws, gives numbers of the host instead.
"""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from common.packing import PackedLayout
from gpu_worker import model_runner, sampler
from gpu_worker.batching import Batcher
from gpu_worker.commands import Arrival
from gpu_worker.engine import Engine, EngineLimits
from gpu_worker.host_storage import HostBlob
from gpu_worker.host_tier import HostTier
from gpu_worker.loader import LoadDone, Loader, _Job
from gpu_worker.loan import Loan
from gpu_worker.memory.geometry import PageGeometry
from gpu_worker.memory.manager import MemoryManager
from gpu_worker.memory.pool import PagePool
from gpu_worker.model_runner import ModelRunner
from gpu_worker.outbox import Outbox
from kernels.cpu.pages import Watch
from loraplex.v1 import engine_pb2, scheduler_pb2, types_pb2
from tests.gpu_worker.engine_driver import new_offer
from tests.gpu_worker.test_no_waits import VOCAB, Device
from tests.gpu_worker.tiny_model import LAYERS, SHAPES, TinyAdapter, write_adapter

GEOMETRY = PageGeometry(LAYERS, num_kv_heads=2, head_dim=8, element_bytes=4, page_size=4)
NUM_PAGES = 80
MAX_TOKENS = 4


class Mark:
    def __init__(self, device: torch.device) -> None: ...

    def seconds_since(self, earlier: "Mark") -> float:
        return 0.0


class Download:
    """Token 1 for everybody, all of them finite, in numbers that the host has."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._copies = [[1] * len(tensor) for tensor in tensors]

    def wait(self) -> list[Any]:
        return [SimpleNamespace(tolist=copy.copy) for copy in self._copies]


class PromptLoader(Loader):
    """Copies when it is asked: fake tensors are for one thread."""

    def __init__(self, pool: PagePool, on_done: Callable[[LoadDone], None]) -> None:
        self._pool = pool
        self._on_done = on_done

    def load(self, adapter_version: str, blob: HostBlob, pages: list[int]) -> None:
        self._on_done(self._do(_Job(adapter_version, blob, pages)))


class Storage:
    """Pinned memory in front of the device, as `PinnedArena` has it; its bytes are as unknown as the device's."""

    def __init__(self, source: PagePool) -> None:
        self._source = source

    def bytes_for(self, layout: PackedLayout) -> int:
        return layout.total_bytes

    def open(self, path: Path, layout: PackedLayout) -> HostBlob:
        return Blob(self._source, layout.total_bytes)


class Blob:
    def __init__(self, source: PagePool, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._source = source

    def copy_to(self, pool: PagePool, pages: list[int], watch: Watch | None = None) -> None:
        pool.copy_pages(pages, self._source, pages)

    def close(self) -> None: ...


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    found = Device(FakeTensorMode(allow_non_fake_inputs=True))
    for module in (model_runner, sampler):
        monkeypatch.setattr(module, "upload", found.upload)
    monkeypatch.setattr(sampler, "on_host", lambda tensor: False)
    monkeypatch.setattr(model_runner, "Download", Download)
    monkeypatch.setattr(model_runner, "Mark", Mark)
    return found


class Host:
    """An engine over fake pages, its loads, and how its requests ended."""

    def __init__(self, device: Device, library: list[TinyAdapter]) -> None:
        self._library = {adapter.version: adapter for adapter in library}
        self._loaded: list[Arrival] = []
        self._mode = device.mode
        with device.mode:
            pool, source = (PagePool(GEOMETRY, NUM_PAGES, "cpu") for _ in range(2))
        memory = MemoryManager(GEOMETRY, NUM_PAGES)
        host_bytes = 64 * GEOMETRY.page_bytes
        model: Any = device
        self.engine = Engine(
            ModelRunner(model, memory, pool, "cpu", VOCAB),
            memory,
            PromptLoader(pool, self._loaded.append),
            HostTier(GEOMETRY, NUM_PAGES, SHAPES, Storage(source), host_bytes),
            EngineLimits(64, 8, 96, VOCAB, ()),
            Loan(),
            overlap=True,
        )
        self.finished: list[types_pb2.FinishReason.ValueType] = []
        self.steps = 0

    def serve(self, offers: list[scheduler_pb2.Offer]) -> None:
        """Until every offer has ended."""
        commands = [scheduler_pb2.Command(seq=seq, offer=offer) for seq, offer in enumerate(offers, start=1)]
        batch = scheduler_pb2.CommandBatch(scheduler_epoch=1, commands=commands)
        arrivals: list[Arrival] = [engine_pb2.EngineCommand(scheduler_commands=batch)]
        while len(self.finished) < len(offers):
            with self._mode:
                *_, last = self.engine.step(arrivals)
            arrivals = [*self._loaded, *(self._fetched(one.adapter_version) for one in last.step.adapters_needed)]
            self._loaded.clear()
            for tokens in last.step.tokens:
                self.finished += [one.finish_reason for one in tokens.sequences if one.finish_reason]
            assert arrivals or self.engine.busy or len(self.finished) == len(offers)
            self.steps += last.step.HasField("stats")
        self.engine.check_integrity()

    def _fetched(self, adapter_version: str) -> Arrival:
        return engine_pb2.EngineCommand(adapter_fetched=self._library[adapter_version].fetched())


@pytest.fixture
def host(device: Device, tmp_path: Path) -> Host:
    return Host(device, [write_adapter(tmp_path, "small", lora_rank=3), write_adapter(tmp_path, "large", lora_rank=24)])


def offers() -> list[scheduler_pb2.Offer]:
    return [
        new_offer(f"request {number}", [3, 5, 7 + number], adapter, max_tokens=MAX_TOKENS, order_key=number)
        for number, adapter in enumerate(["", "small", "large", "small"])
    ]


def test_a_step_from_its_commands_to_its_messages(device: Device, host: Host) -> None:
    host.serve(offers())
    assert host.finished == [types_pb2.FINISH_REASON_LENGTH] * 4
    assert host.steps >= MAX_TOKENS
    fed = [batch.feed for batch in device.batches if batch.feed is not None]
    assert fed, "no step was launched before the one before was read"
    assert max(len(batch.adapters.dtype) for batch in device.batches if batch.adapters is not None) == 2


def looking(device: Device, call: Callable[..., Any]) -> Callable[..., Any]:
    """The same call, after a look at a number that only the device has."""

    def looks(*arguments: Any, **options: Any) -> Any:
        device.bytes.sum().item()
        return call(*arguments, **options)

    return looks


@pytest.mark.parametrize(("owner", "name"), [(Batcher, "plan"), (Outbox, "token"), (Outbox, "take")], ids=str)
def test_control_a_look_in_a_step_is_noticed(
    owner: type, name: str, device: Device, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, looking(device, getattr(owner, name)))
    with pytest.raises(DataDependentOutputException):
        host.serve(offers())


def test_control_a_look_in_a_load_is_noticed(device: Device, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a copy raises, the requests of its adapter fail."""
    monkeypatch.setattr(PagePool, "copy_pages", looking(device, PagePool.copy_pages))
    host.serve(offers())
    assert host.finished.count(types_pb2.FINISH_REASON_ERROR) == 3
