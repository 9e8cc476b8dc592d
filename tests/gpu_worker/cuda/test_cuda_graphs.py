"""How a graph is captured, on a device that takes notes."""

import pytest
import torch
from torch import Tensor

from gpu_worker.cuda.executor import CudaGraphs
from tests.fake_cuda import Device


def test_graphs_are_captured_behind_a_run_that_compiles_and_share_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copying thread goes on meanwhile: only the capturing thread's calls are the capture's."""
    device, result = Device(), torch.zeros(1)
    device.install(monkeypatch)

    def run() -> Tensor:
        device.work()
        return result

    replay = CudaGraphs()(run)
    assert device.notes == ["wait", "work", "wait", "capture into a pool, thread_local"]
    device.notes.clear()
    assert [replay() is result for _ in range(2)] == [True, True]
    assert device.notes == ["replay", "work"] * 2
