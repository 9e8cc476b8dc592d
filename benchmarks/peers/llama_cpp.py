"""llama.cpp in float32, through its C API: no server, no tokenizer. The requests of one adapter are one batch.

llama.cpp applies one set of adapters to a whole batch, so requests of different adapters cannot share one. Within an
adapter the batching is continuous: every step has a token of each running sequence, then as much of the waiting
prompts as the batch takes. The cache is unified, its better setting.
"""

import os
import time
from pathlib import Path
from typing import Any

import llama_cpp as api
import numpy as np

from benchmarks.peers.gguf_files import write_adapter, write_base
from benchmarks.serving.outcome import Outcome, peak_rss_bytes, reset_peak_rss
from benchmarks.serving.workload import BASE, Workload

BATCH_TOKENS = 512
MAX_SEQUENCES = 64
CONTEXT_TOKENS = MAX_SEQUENCES * 192


# It tells about every tensor. The callback must outlive the library.
_SILENCE = api.llama_log_callback(lambda level, text, data: None)


class LlamaCppSystem:
    """Files are converted and adapters loaded before the clock starts."""

    def __init__(self, folder: Path, threads: int) -> None:
        api.llama_log_set(_SILENCE, None)
        api.llama_backend_init()
        self._folder, self._gguf = folder, folder / "gguf"
        self._gguf.mkdir(exist_ok=True)
        self._config = write_base(folder / "base", self._gguf / "base.gguf")
        self._vocab = self._config["vocab_size"]
        model = api.llama_model_load_from_file(str(self._gguf / "base.gguf").encode(), api.llama_model_default_params())
        if not model:
            raise RuntimeError("llama.cpp did not load the converted model")
        options = api.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = CONTEXT_TOKENS, BATCH_TOKENS, BATCH_TOKENS
        options.n_seq_max, options.kv_unified = MAX_SEQUENCES, True
        options.type_k = options.type_v = api.GGML_TYPE_F32
        options.n_threads = options.n_threads_batch = threads
        self._model, self._context = model, api.llama_init_from_model(model, options)
        self._memory = api.llama_get_memory(self._context)
        self._batch = api.llama_batch_init(BATCH_TOKENS, 0, 1)
        self._adapters: dict[int, Any] = {}

    def run(self, workload: Workload, how: str) -> Outcome:
        order = list(dict.fromkeys(request.adapter for request in workload.requests))
        for adapter in order:
            self._load(adapter)
        pids = [os.getpid()]
        reset_peak_rss(pids)
        outputs: dict[int, list[int]] = {}
        times: dict[int, list[float]] = {}
        started = time.perf_counter()
        for adapter in order:
            self._apply(adapter)
            members = [index for index, request in enumerate(workload.requests) if request.adapter == adapter]
            self._generate(workload, members, outputs, times, started)
        seconds = time.perf_counter() - started
        indices = range(len(workload.requests))
        tokens = tuple(tuple(outputs[index]) for index in indices)
        return Outcome(seconds, tokens, tuple(tuple(times[index]) for index in indices), peak_rss_bytes(pids))

    def close(self) -> None:
        """Nothing outlives the process."""

    def _load(self, adapter: int) -> None:
        if adapter != BASE and adapter not in self._adapters:
            path = self._gguf / f"{adapter}.gguf"
            write_adapter(self._folder / "adapters" / f"adapter-{adapter:03d}", path, self._config)
            self._adapters[adapter] = api.llama_adapter_lora_init(self._model, str(path).encode())

    def _apply(self, adapter: int) -> None:
        if adapter == BASE:
            api.llama_set_adapters_lora(self._context, None, 0, None)
            return
        adapters = (api.llama_adapter_lora_p_ctypes * 1)(self._adapters[adapter])
        scales = (api.ctypes.c_float * 1)(1.0)
        if api.llama_set_adapters_lora(self._context, adapters, 1, scales):
            raise RuntimeError(f"llama.cpp did not take adapter {adapter}")

    def _generate(
        self,
        workload: Workload,
        members: list[int],
        outputs: dict[int, list[int]],
        times: dict[int, list[float]],
        started: float,
    ) -> None:
        """All requests of the adapter in force. `done[s]`: tokens of sequence s that are in the cache."""
        tokens = [list(workload.requests[index].prompt) for index in members]
        ends = [len(workload.requests[index].prompt) + workload.requests[index].output_tokens for index in members]
        done, moments = [0] * len(members), [list[float]() for _ in members]
        api.llama_memory_clear(self._memory, False)
        while running := [s for s in range(len(members)) if len(tokens[s]) < ends[s]]:
            asked = self._fill(running, tokens, done)
            if api.llama_decode(self._context, self._batch):
                raise RuntimeError("llama.cpp did not decode a batch")
            now = time.perf_counter() - started
            for sequence, place in asked:
                logits = np.ctypeslib.as_array(api.llama_get_logits_ith(self._context, place), (self._vocab,))
                tokens[sequence].append(int(logits.argmax()))
                moments[sequence].append(now)
                if len(tokens[sequence]) == ends[sequence]:
                    api.llama_memory_seq_rm(self._memory, sequence, -1, -1)
        for number, index in enumerate(members):
            outputs[index] = tokens[number][len(workload.requests[index].prompt) :]
            times[index] = moments[number]

    def _fill(self, running: list[int], tokens: list[list[int]], done: list[int]) -> list[tuple[int, int]]:
        """Puts tokens into the batch, decodes first; returns (sequence, place) of those whose logits are wanted."""
        place, asked = 0, []
        for sequence in sorted(running, key=lambda s: len(tokens[s]) - done[s] > 1):
            for position in range(done[sequence], min(len(tokens[sequence]), done[sequence] + BATCH_TOKENS - place)):
                last = position == len(tokens[sequence]) - 1
                self._batch.token[place], self._batch.pos[place] = tokens[sequence][position], position
                self._batch.n_seq_id[place], self._batch.seq_id[place][0] = 1, sequence
                self._batch.logits[place] = last
                if last:
                    asked.append((sequence, place))
                place += 1
                done[sequence] = position + 1
        self._batch.n_tokens = place
        return asked
