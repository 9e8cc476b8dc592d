"""vLLM on CPUs, its LoRA on or off. float32, greedy, no detokenising, no prefix cache; everything else its default."""

import os
import time
from pathlib import Path
from typing import Any

from benchmarks.serving.outcome import Outcome, peak_rss_bytes, reset_peak_rss, with_children
from benchmarks.serving.workload import BASE, Workload

CONTEXT_TOKENS = 256
MAX_SEQUENCES = 64
MAX_RANK = 64
KV_GIB = 2


class VllmSystem:
    """`adapters`: how many may be in one batch; 0 leaves LoRA off, and vLLM compiles the model."""

    def __init__(self, folder: Path, threads: int, adapters: int) -> None:
        os.environ |= {"VLLM_CPU_KVCACHE_SPACE": str(KV_GIB), "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}"}
        os.environ |= {"VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        from vllm import LLM

        lora: dict[str, Any] = {}
        if adapters:
            lora = {"enable_lora": True, "max_loras": adapters, "max_lora_rank": MAX_RANK}
        self._folder = folder
        self._model = LLM(
            str(folder / "base"),
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=CONTEXT_TOKENS,
            max_num_seqs=MAX_SEQUENCES,
            enable_prefix_caching=False,
            **lora,
        )

    def run(self, workload: Workload, how: str) -> Outcome:
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        prompts = [{"prompt_token_ids": list(request.prompt)} for request in workload.requests]
        sampling = [
            SamplingParams(temperature=0.0, max_tokens=request.output_tokens, ignore_eos=True, detokenize=False)
            for request in workload.requests
        ]
        adapters = [
            None
            if request.adapter == BASE
            else LoRARequest(
                f"adapter-{request.adapter:03d}",
                request.adapter + 1,
                str(self._folder / "adapters" / f"adapter-{request.adapter:03d}"),
            )
            for request in workload.requests
        ]
        lora = {"lora_request": adapters} if any(adapters) else {}
        pids = with_children(os.getpid())
        reset_peak_rss(pids)
        started = time.perf_counter()
        answers = self._model.generate(prompts, sampling, use_tqdm=False, **lora)
        seconds = time.perf_counter() - started
        outputs = tuple(tuple(answer.outputs[0].token_ids) for answer in answers)
        return Outcome(seconds, outputs, tuple(() for _ in outputs), peak_rss_bytes(pids))

    def close(self) -> None:
        """Its engine process ends with this one."""
