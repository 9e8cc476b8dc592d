"""PEFT, which is also the oracle: its tokens are the ones that every system must give.

Pinned to what is best for it: float32, scaled dot product attention, key-value cache, batches of 32 sorted by output
length so that little is computed for requests that have ended, padding on the left. `mixed` puts requests of different
adapters into one batch (`adapter_names`), `grouped` batches the requests of each adapter, `alone` is one by one.
"""

import os
import time
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from benchmarks.serving.fixture import Fixture
from benchmarks.serving.outcome import Outcome, peak_rss_bytes, reset_peak_rss
from benchmarks.serving.workload import BASE, Request, Workload

BATCH = 32
PAD = 0
# PEFT's word for requests without an adapter.
BASE_NAME = "__base__"


class _Clock(StoppingCriteria):  # type: ignore[misc]  # transformers has no types
    """Stops nothing; notes when each step's tokens were there."""

    def __init__(self, started: float) -> None:
        self._started = started
        self.seconds: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        self.seconds.append(time.perf_counter() - self._started)
        return torch.zeros(len(input_ids), dtype=torch.bool)


class PeftSystem:
    """`how` is mixed, grouped or alone. Adapters are loaded before the clock starts."""

    def __init__(self, fixture: Fixture, threads: int) -> None:
        torch.set_num_threads(threads)
        self._fixture = fixture
        self._base = AutoModelForCausalLM.from_pretrained(fixture.base, dtype=torch.float32).eval()
        self._model: Any = None
        self._loaded: set[int] = set()

    def run(self, workload: Workload, how: str) -> Outcome:
        self._load({request.adapter for request in workload.requests} - {BASE})
        pids = [os.getpid()]
        reset_peak_rss(pids)
        tokens: dict[int, tuple[int, ...]] = {}
        times: dict[int, tuple[float, ...]] = {}
        started = time.perf_counter()
        for batch in _batches(workload, how):
            clock = _Clock(started)
            rows = self._generate([workload.requests[index] for index in batch], how, clock)
            for index, row in zip(batch, rows, strict=True):
                length = workload.requests[index].output_tokens
                tokens[index], times[index] = tuple(row[:length]), tuple(clock.seconds[:length])
        seconds = time.perf_counter() - started
        order = range(len(workload.requests))
        outputs, token_seconds = tuple(tokens[index] for index in order), tuple(times[index] for index in order)
        return Outcome(seconds, outputs, token_seconds, peak_rss_bytes(pids))

    def close(self) -> None:
        """Nothing outlives the process."""

    def _generate(self, requests: list[Request], how: str, clock: _Clock) -> list[list[int]]:
        longest = max(len(request.prompt) for request in requests)
        rows = [[PAD] * (longest - len(request.prompt)) + list(request.prompt) for request in requests]
        mask = [[0] * (longest - len(request.prompt)) + [1] * len(request.prompt) for request in requests]
        options: dict[str, Any] = {
            "input_ids": torch.tensor(rows),
            "attention_mask": torch.tensor(mask),
            "max_new_tokens": max(request.output_tokens for request in requests),
            "do_sample": False,
            "eos_token_id": None,
            "pad_token_id": PAD,
            "stopping_criteria": StoppingCriteriaList([clock]),
        }
        names = [_name(request.adapter) for request in requests]
        model = self._model if self._model is not None else self._base
        with torch.inference_mode():
            if how == "mixed" and self._model is not None:
                output = model.generate(adapter_names=names, **options)
            else:
                if self._model is not None:
                    model.set_adapter(names[0])
                output = model.generate(**options)
        return [row[longest:].tolist() for row in output]

    def _load(self, adapters: set[int]) -> None:
        for adapter in sorted(adapters - self._loaded):
            folder = self._fixture.peft_folder(adapter)
            if self._model is None:
                self._model = PeftModel.from_pretrained(self._base, folder, adapter_name=_name(adapter)).eval()
            else:
                self._model.load_adapter(folder, adapter_name=_name(adapter))
            self._loaded.add(adapter)


def _name(adapter: int) -> str:
    return BASE_NAME if adapter == BASE else f"adapter-{adapter:03d}"


def _batches(workload: Workload, how: str) -> Iterator[list[int]]:
    """Numbers of the requests that are generated together."""
    order = sorted(range(len(workload.requests)), key=lambda index: workload.requests[index].output_tokens)
    groups = [order]
    if how == "grouped":
        adapters = sorted({request.adapter for request in workload.requests})
        groups = [[index for index in order if workload.requests[index].adapter == one] for one in adapters]
    size = 1 if how == "alone" else BATCH
    for group in groups:
        yield from (group[start : start + size] for start in range(0, len(group), size))
