"""A launch asks the device for nothing: it runs on tensors that have a type and a shape and no numbers.

PyTorch's fake tensors raise when anybody asks for a value (`.item()`, `.tolist()`, `bool()`) or for a shape that values
decide (a boolean mask as an index, `nonzero`): what on a GPU would wait for it. They need no GPU.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)

from gpu_worker import logit_changes, model_runner, sampler
from gpu_worker.batch import ForwardBatch
from gpu_worker.batching import Batcher
from gpu_worker.memory.manager import MemoryManager
from gpu_worker.model_runner import ModelRunner
from gpu_worker.sequence import SamplingParams, Sequence
from tests.gpu_worker.support import SMALL_PAGES, waiting_sequence

VOCAB = 64
DEVICE = torch.device("cpu")
GREEDY = SamplingParams(temperature=0.0, seed=0)
PARAMS = {
    "greedy": GREEDY,
    "drawn": replace(GREEDY, temperature=0.7, seed=3),
    "filtered": replace(GREEDY, temperature=1.2, top_k=7, top_p=0.9, min_p=0.01),
    "penalised": replace(GREEDY, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2),
    "biased": replace(GREEDY, temperature=1.0, logit_bias=((3, 1.5), (9, -4.0))),
    "described": replace(GREEDY, logprobs=3, prompt_logprobs=2),
}


class Device:
    """In place of a model, a pool and a copy back."""

    dtype = torch.float32

    def __init__(self, mode: FakeTensorMode) -> None:
        self.mode = mode
        self.bytes = self.tensor(4, 8)
        self.batches: list[ForwardBatch] = []
        self.downloads: list[list[Tensor]] = []

    def tensor(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        with self.mode:
            return torch.empty(shape, dtype=dtype, device=DEVICE)

    def kv_pages(self, dtype: torch.dtype) -> Tensor:
        return self.bytes

    def forward(self, batch: ForwardBatch) -> Tensor:
        self.batches.append(batch)
        return torch.empty((len(batch.logit_rows), VOCAB), device=DEVICE)

    def upload(self, array: npt.NDArray[np.generic], device: torch.device) -> Tensor:
        return torch.empty(array.shape, dtype=torch.from_numpy(array).dtype, device=device)

    def download(self, tensors: list[Tensor]) -> None:
        self.downloads.append(list(tensors))


class Mark:
    def __init__(self, device: torch.device) -> None:
        self.device = device


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    found = Device(FakeTensorMode(allow_non_fake_inputs=True))
    for module in (logit_changes, model_runner, sampler):
        monkeypatch.setattr(module, "upload", found.upload)
    monkeypatch.setattr(sampler, "on_host", lambda tensor: False)
    monkeypatch.setattr(model_runner, "Download", found.download)
    monkeypatch.setattr(model_runner, "Mark", Mark)
    return found


def launched(device: Device, params: list[SamplingParams], steps: int = 3) -> list[Sequence]:
    """Sequences that have been in `steps` steps, of which nobody has read a token."""
    memory = MemoryManager(SMALL_PAGES, 40)
    batcher = Batcher(memory, lambda adapter: None, max_step_tokens=64, max_sequences=16)
    stand_in: Any = device
    runner = ModelRunner(stand_in, memory, stand_in, "cpu", VOCAB)
    sequences = [waiting_sequence(f"s{number}", 5 + number, order_key=number) for number in range(len(params))]
    for sequence, param in zip(sequences, params, strict=True):
        sequence.sampling = param
        batcher.add(sequence)
    with device.mode:
        for step in range(1, steps + 1):
            plan = batcher.plan(step - 1, in_flight=step > 1)
            runner.launch(plan.chunks, step)
            for chunk in plan.chunks:
                batcher.launch(chunk)
            if step > 1:
                # what the engine does with the step before, but for the token's number
                for sequence in sequences:
                    sequence.output_token_ids.append(0)
                    sequence.pending_tokens -= 1
    return sequences


@pytest.mark.parametrize("names", [*([name] for name in PARAMS), list(PARAMS)], ids=[*PARAMS, "all"])
def test_three_steps_are_launched_without_a_look_at_the_first(device: Device, names: list[str]) -> None:
    launched(device, [PARAMS[name] for name in names])
    assert len(device.batches) == 3
    fed = [batch.feed for batch in device.batches]
    assert fed[0] is None
    for feed in fed[1:]:
        assert feed is not None
        assert isinstance(feed.token_ids, FakeTensor)
        assert feed.token_ids.shape == (len(names),)
    assert all(isinstance(tensor, FakeTensor) for tensors in device.downloads for tensor in tensors)


LOOKS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda logits: logits.argmax().item(),
    "tolist": lambda logits: logits.argmax(dim=1).tolist(),
    "mask": lambda logits: logits[logits > 0],
    "bool": lambda logits: bool((logits > 0).any()),
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_control_a_look_is_noticed(device: Device, look: Callable[[Tensor], Any]) -> None:
    with device.mode, pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        look(torch.empty(2, VOCAB, device=DEVICE))
