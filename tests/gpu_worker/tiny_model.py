"""A tiny random Llama as transformers saves it, and real adapters for it, packed by the product's own packer."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM

from common import packing
from common.wire import layout_to_proto
from loraplex.v1 import engine_pb2

VOCAB = 64
EOS = 1
LAYERS = 2
CONTEXT = 96
SHAPES = {"q_proj": (32, 32), "v_proj": (32, 16), "down_proj": (48, 32)}
# 2 layers, K and V, 2 heads of 8 floats: bytes of a page of 4 tokens
PAGE_BYTES = 4 * LAYERS * 2 * 2 * 8 * 4


def save_tiny_llama(directory: Path) -> Path:
    """Weights spread so far that the largest logit leaves no doubt."""
    torch.manual_seed(5)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, max_position_embeddings=CONTEXT, bos_token_id=0, eos_token_id=EOS, **sizes, **heads
        )
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = 0.3 * torch.randn(parameter.shape)
    model.save_pretrained(directory)
    words = {f"w{token}": token for token in range(VOCAB)}
    Tokenizer(WordLevel(words, unk_token="w0")).save(str(directory / "tokenizer.json"))
    return directory


@dataclass(frozen=True, slots=True)
class TinyAdapter:
    """A packed adapter in a file, as the face's cache keeps it."""

    version: str
    path: Path
    layout: packing.PackedLayout

    @property
    def num_pages(self) -> int:
        return -(-self.layout.total_bytes // PAGE_BYTES)

    @property
    def content(self) -> bytes:
        return self.path.read_bytes()

    def fetched(self) -> engine_pb2.AdapterFetched:
        return engine_pb2.AdapterFetched(
            tenant="default", adapter_version=self.version, path=str(self.path), layout=layout_to_proto(self.layout)
        )

    def corrupted(self, directory: Path) -> "TinyAdapter":
        """The same with one bit flipped in the middle of the file."""
        content = bytearray(self.content)
        content[len(content) // 2] ^= 1
        path = directory / f"{self.version}.corrupted"
        path.write_bytes(content)
        return replace(self, path=path)

    def cut_short(self, directory: Path) -> "TinyAdapter":
        """The same without its last byte."""
        path = directory / f"{self.version}.short"
        path.write_bytes(self.content[:-1])
        return replace(self, path=path)


def write_adapter(
    directory: Path,
    version: str,
    *,
    lora_rank: int,
    modules: tuple[str, ...] = ("q_proj", "v_proj"),
    width: int = 32,
    num_layers: int = LAYERS,
) -> TinyAdapter:
    """Random and far from zero. Another `width` or `num_layers` fits another base model."""
    rng = np.random.default_rng(list(version.encode()))
    specs, weights = [], {}
    for layer in range(num_layers):
        for module in modules:
            in_features, out_features = SHAPES[module]
            in_features += width - 32
            specs.append(packing.ModuleSpec(layer, module, lora_rank, 1.5, in_features, out_features))
            a = rng.normal(0, 0.4, (lora_rank, in_features)).astype(np.float32)
            b = rng.normal(0, 0.4, (out_features, lora_rank)).astype(np.float32)
            weights[layer, module] = (a, b)
    layout, data = packing.pack(packing.plan(specs, "float32"), weights)
    path = directory / f"{version}.packed"
    path.write_bytes(data.tobytes())
    return TinyAdapter(version, path, layout)
