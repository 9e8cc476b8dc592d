"""Decode attention over page-major and layer-major KV, in turns: `python -m benchmarks.memory.layout`.

One JSON line a row. Page-major keeps all layers of a page together, as the pool must for adapters to share it.
Layer-major keeps all pages of a layer together, as engines with a KV cache alone do. The kernel takes strides.
"""

import json
import time
from statistics import median

import torch

from benchmarks.hardware import commit, hardware
from kernels.paged_attention import paged_attention

LAYERS, KV_HEADS, HEADS, HEAD_DIM, PAGE_SIZE = 16, 4, 12, 64, 16
ROUNDS = 15
GOAL = 0.97


def row(sequences: int, context: int) -> dict[str, object]:
    """Seconds of one decode step's attention, all layers, in both layouts."""
    pages = -(-context // PAGE_SIZE)
    shape = (sequences * pages, LAYERS, 2, PAGE_SIZE, KV_HEADS, HEAD_DIM)
    page_major = torch.randn(shape)
    layer_major = page_major.transpose(0, 1).contiguous().transpose(0, 1)
    table = torch.randperm(sequences * pages).to(torch.int32).view(sequences, pages)
    query = torch.randn(sequences, HEADS, HEAD_DIM)
    starts = torch.arange(sequences + 1, dtype=torch.int32)
    lengths = torch.full((sequences,), context, dtype=torch.int32)

    def seconds(kv_pages: torch.Tensor) -> float:
        started = time.perf_counter()
        for layer in range(LAYERS):
            paged_attention(query, kv_pages, table, starts, lengths, layer, HEAD_DIM**-0.5, decode_only=True)
        return time.perf_counter() - started

    times = [(seconds(page_major), seconds(layer_major)) for _ in range(ROUNDS)]
    page, layer = (median(side) for side in zip(*times, strict=True))
    ratio = median(layer / page for page, layer in times)
    return {
        "bench": "kv layout",
        "sequences": sequences,
        "context": context,
        "page_major_seconds": page,
        "layer_major_seconds": layer,
        "page_major_speed_to_layer_major": ratio,
        "goal": GOAL,
        "reached": ratio >= GOAL,
        "hardware": hardware(),
        "commit": commit(),
    }


if __name__ == "__main__":
    for sequences, context in ((1, 2048), (8, 1024), (32, 512), (64, 256)):
        print(json.dumps(row(sequences, context)))
