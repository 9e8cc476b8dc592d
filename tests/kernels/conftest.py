"""Fresh float memory is full of NaN while a kernel runs, so that an element nobody wrote fails loudly."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from kernels import dispatch


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


@pytest.fixture(params=[*dispatch.CPU_BACKENDS, pytest.param(dispatch.TRITON, marks=pytest.mark.triton)])
def backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """The test runs on every backend, and fails where one does not take its tensors."""
    with dispatch.force(request.param):
        yield


@pytest.fixture(params=dispatch.CPU_BACKENDS)
def cpu_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """As `backend`, for sizes that Triton's interpreter would take minutes for."""
    with dispatch.force(request.param):
        yield
