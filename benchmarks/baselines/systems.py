"""The baselines as systems of the serving benchmark."""

import re
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file

from benchmarks.baselines.divided import Divided, Slotted
from benchmarks.baselines.merging import Matrices, Merger
from benchmarks.baselines.padded_bmm import PaddedBmm, PaddedRunner
from benchmarks.kernels.models import RANKS
from benchmarks.serving.fixture import Fixture, page_geometry, slot_bytes
from benchmarks.serving.outcome import Outcome
from benchmarks.serving.systems.engine import EngineSystem
from benchmarks.serving.workload import BASE, Workload
from gpu_worker import engine_main
from gpu_worker.config import EngineConfig
from gpu_worker.engine import Engine
from gpu_worker.models import decoder, load_model
from gpu_worker.models.decoder import Decoder
from loraplex.v1 import engine_pb2

Built = tuple[Engine, engine_pb2.EngineReady]


def start(name: str, fixture: Fixture, threads: int, memory: str, adapter_bytes: int) -> EngineSystem:
    """A baseline by its name in the catalogue."""
    if name == "eager":
        return EagerSystem(fixture, threads, memory)
    if name == "padded-bmm":
        return PaddedSystem(fixture, threads, memory)
    if name == "merge":
        return MergingSystem(fixture, threads, memory)
    return DividedSystem(fixture, threads, memory, adapter_bytes, slotted=name == "slots")


class EagerSystem(EngineSystem):
    """Our engine with operations written down in every step: what replaces a compiled one cannot be recorded, and
    beside this only the products of `padded-bmm` are others."""

    def __init__(self, fixture: Fixture, threads: int, memory: str = "") -> None:
        super().__init__(fixture, threads, memory, _with(RecordedDecoder=lambda decoder: decoder))


class PaddedSystem(EngineSystem):
    """Raises RuntimeError when the products it replaces were not called: then it would measure our own."""

    def __init__(self, fixture: Fixture, threads: int, memory: str = "") -> None:
        self._bmm = PaddedBmm(lora_rank=max(RANKS))
        self._stack = ExitStack()
        self._stack.enter_context(mock.patch.object(decoder, "lora_shrink", self._bmm.shrink))
        self._stack.enter_context(mock.patch.object(decoder, "lora_expand", self._bmm.expand))
        runner = type("Runner", (PaddedRunner,), {"bmm": self._bmm})
        super().__init__(fixture, threads, memory, _with(ModelRunner=runner))

    def run(self, workload: Workload, how: str = "") -> Outcome:
        before = self._bmm.calls
        outcome = super().run(workload, how)
        if workload.distinct and self._bmm.calls == before:
            raise RuntimeError("the engine did not call the padded products")
        return outcome

    def close(self) -> None:
        self._stack.close()


class DividedSystem(EngineSystem):
    """`how` it is divided is fixed when the engine is built."""

    def __init__(self, fixture: Fixture, threads: int, memory: str, adapter_bytes: int, *, slotted: bool) -> None:
        geometry = page_geometry(fixture)
        sizes = {"adapter_pages": geometry.pages_for_bytes(adapter_bytes)}
        if slotted:
            sizes["slot_pages"] = geometry.pages_for_bytes(slot_bytes(fixture))
        manager = type("Memory", (Slotted if slotted else Divided,), sizes)
        super().__init__(fixture, threads, memory, _with(MemoryManager=manager))


class MergingSystem(EngineSystem):
    """Merging is inside the measured time, reading files is not."""

    def __init__(self, fixture: Fixture, threads: int, memory: str = "") -> None:
        models: list[Decoder] = []

        def load(*arguments: Any) -> Decoder:
            models.append(load_model(*arguments))
            return models[-1]

        super().__init__(fixture, threads, memory, _with(load_model=load))
        self._merger = Merger(models[0])
        self._matrices: dict[int, Matrices] = {}

    def run(self, workload: Workload, how: str = "") -> Outcome:
        order = list(dict.fromkeys(request.adapter for request in workload.requests))
        for adapter in order:
            if adapter != BASE and adapter not in self._matrices:
                self._matrices[adapter] = read_matrices(self._fixture, adapter)
        started, parts = time.perf_counter(), []
        for adapter in order:
            if adapter != BASE:
                self._merger.merge(self._matrices[adapter])
            members = [index for index, request in enumerate(workload.requests) if request.adapter == adapter]
            requests = tuple(replace(workload.requests[index], adapter=BASE) for index in members)
            began = time.perf_counter() - started
            parts.append((members, began, super().run(Workload(workload.name, 0, requests))))
            self._merger.unmerge()
        return _joined(parts, time.perf_counter() - started)


def _joined(parts: list[tuple[list[int], float, Outcome]], seconds: float) -> Outcome:
    outputs: dict[int, tuple[int, ...]] = {}
    times: dict[int, tuple[float, ...]] = {}
    for members, began, part in parts:
        outputs.update(zip(members, part.outputs, strict=True))
        for index, came in zip(members, part.token_seconds, strict=True):
            times[index] = tuple(began + moment for moment in came)
    order = sorted(outputs)
    peak = max(part.peak_rss_bytes for _, _, part in parts)
    return Outcome(seconds, tuple(outputs[i] for i in order), tuple(times[i] for i in order), peak)


def _with(**parts: Any) -> Callable[[EngineConfig, engine_main.Inbox], Built]:
    """The product's own way to build an engine, with some of its names standing for something else."""

    def build(config: EngineConfig, inbox: engine_main.Inbox) -> Built:
        with mock.patch.multiple(engine_main, **parts):
            return engine_main.build(config, inbox)

    return build


def read_matrices(fixture: Fixture, adapter: int) -> Matrices:
    """From the folder that PEFT saved."""
    folder = fixture.peft_folder(adapter)
    found: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        match = re.fullmatch(r".*\.layers\.(\d+)\.\w+\.(\w+)\.lora_([AB])\.weight", name)
        if match is None:
            raise ValueError(f"{folder} holds {name}, which is no matrix of a decoder's LoRA")
        found.setdefault((int(match[1]), match[2]), {})[match[3]] = tensor
    # alpha is twice the rank of every adapter here
    return {key: (pair["A"], pair["B"], 2.0) for key, pair in found.items()}
