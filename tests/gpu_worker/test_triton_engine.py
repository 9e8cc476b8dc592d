"""The whole engine with every Triton kernel, in Triton's interpreter, against transformers."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from common import packing
from kernels import dispatch
from tests.gpu_worker.engine_driver import EngineDriver
from tests.gpu_worker.tiny_model import TinyAdapter, save_tiny_llama, write_adapter

pytestmark = pytest.mark.triton

OPS = ("linear", "lora_shrink", "lora_expand", "paged_attention", "store_kv", "rms_norm", "silu_and_mul")
MAX_TOKENS = 6


def merged(checkpoint: Path, adapter: TinyAdapter | None) -> LlamaForCausalLM:
    """The base model with scaling * B A added to its weights."""
    model = LlamaForCausalLM.from_pretrained(checkpoint)
    if adapter is None:
        return model
    weights = packing.unpack(adapter.layout, np.frombuffer(adapter.content, np.uint8), np.float32)
    for module in adapter.layout.modules:
        a, b = (torch.from_numpy(np.array(side, np.float32)) for side in weights[module.layer, module.module])
        layer = model.model.layers[module.layer]
        block = layer.mlp if module.module == "down_proj" else layer.self_attn
        getattr(block, module.module).weight.data += module.scaling * b @ a
    return model


def greedy(model: LlamaForCausalLM, prompt: Sequence[int]) -> list[int]:
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(MAX_TOKENS):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_every_kernel_serves_base_and_adapters_in_one_batch(tmp_path: Path) -> None:
    """Prompts longer than a step run in chunks beside decodes; ranks differ and one adapter has other modules."""
    checkpoint = save_tiny_llama(tmp_path / "base")
    library = [
        write_adapter(tmp_path, "small", lora_rank=3),
        write_adapter(tmp_path, "large", lora_rank=24),
        write_adapter(tmp_path, "down", lora_rank=8, modules=("v_proj", "down_proj")),
    ]
    prompts = {"": [3, 9, 4], "small": [5, 7, 11, 2, 8], "large": [6] * 9 + [13], "down": list(range(2, 22))}
    calls = dispatch.calls.copy()
    with dispatch.force("triton"):
        driver = EngineDriver(checkpoint, library, max_step_tokens=16, max_sequences=8)
        for version, prompt in prompts.items():
            driver.offer(version or "base", prompt, version, max_tokens=MAX_TOKENS)
        driver.run()
    ran: Counter[tuple[str, str]] = dispatch.calls - calls
    # rows are gathered by torch, on a GPU too
    assert set(ran) == {*((op, "triton") for op in OPS), ("take_rows", "reference")}
    assert max(stats.distinct_adapters for stats in driver.stats) > 2
    adapters = {adapter.version: adapter for adapter in library}
    for version, prompt in prompts.items():
        assert driver.tokens[version or "base"] == greedy(merged(checkpoint, adapters.get(version)), prompt)
    # an answer of the base model would be noticed
    assert greedy(merged(checkpoint, None), prompts["large"]) != driver.tokens["large"]
