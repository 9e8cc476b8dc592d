"""Fresh float memory is full of NaN while a kernel runs, so that an element nobody wrote fails loudly."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from kernels import dispatch
from kernels.cpu.library import vector_lanes
from kernels.linear import cpu as linear_cpu
from kernels.lora_expand import cpu as lora_expand_cpu
from kernels.lora_shrink import cpu as lora_shrink_cpu


def _poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = make(*args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    return poisoned


@pytest.fixture(autouse=True)
def poison_fresh_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20)


# The compiled kernels with vectors of eight where the CPU has wider ones; else the same as "cpu" once more.
NARROW = "cpu-8-lanes"
CPU_BACKENDS = (*dispatch.CPU_BACKENDS, NARROW)


@contextmanager
def forced(backend: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if backend == NARROW:
        use_lanes(8, monkeypatch)
        backend = "cpu"
    with dispatch.force(backend):
        yield


def use_lanes(lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations whose compiled kernels know more than one width of vectors take this one."""
    for module in (linear_cpu, lora_shrink_cpu, lora_expand_cpu):
        monkeypatch.setattr(module, "vector_lanes", lambda: lanes)


@pytest.fixture(params=[*CPU_BACKENDS, pytest.param(dispatch.TRITON, marks=pytest.mark.triton)])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The test runs on every backend, and fails where one does not take its tensors."""
    with forced(request.param, monkeypatch):
        yield


@pytest.fixture(params=CPU_BACKENDS)
def cpu_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As `backend`, for sizes that Triton's interpreter would take minutes for."""
    with forced(request.param, monkeypatch):
        yield


@pytest.fixture(params=[8, 16], ids=["8-lanes", "16-lanes"])
def lanes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Both instruction sets where the CPU has both; else the one it has, twice."""
    lanes = min(int(request.param), vector_lanes())
    use_lanes(lanes, monkeypatch)
    return lanes
