"""Tries tiles on this device and writes the best of each (op, shape class) into kernels/gpu/tiles.json.

A candidate that does not compile, or finds no room on the device, is passed over. Entries of other architectures stay.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.machine import seconds_of
from benchmarks.gpu.operations import Case, cases
from benchmarks.gpu.shapes import ModelShape, StepShape
from kernels import dispatch
from kernels.gpu import tiles

LAUNCH = {"num_warps": (4, 8), "num_stages": (2, 3, 4)}
CANDIDATES: dict[tuple[str, str], dict[str, tuple[int, ...]]] = {
    ("lora_shrink", tiles.DECODE): {
        "BLOCK_T": (16,),
        "BLOCK_R": (16, 32),
        "BLOCK_K": (128, 256),
        "SPLIT_K": (1, 2, 4, 8),
    },
    ("lora_shrink", tiles.PREFILL): {
        "BLOCK_T": (32, 64, 128),
        "BLOCK_R": (16, 32),
        "BLOCK_K": (64, 128),
        "SPLIT_K": (1,),
    },
    ("lora_expand", tiles.DECODE): {"BLOCK_T": (16,), "BLOCK_R": (16, 32), "BLOCK_N": (64, 128, 256)},
    ("lora_expand", tiles.PREFILL): {"BLOCK_T": (32, 64), "BLOCK_R": (16, 32), "BLOCK_N": (64, 128)},
    # the chunk is not tuned: it is the same for decodes and prompts, see tests/kernels/test_tiles.py
    ("paged_attention", tiles.DECODE): {"BLOCK_M": (16,), "BLOCK_N": (32, 64, 128), "CHUNK": (512,)},
    ("paged_attention", tiles.PREFILL): {"BLOCK_M": (64, 128), "BLOCK_N": (32, 64), "CHUNK": (512,)},
}


def candidates(op: str, shape_class: str) -> Iterator[dict[str, int]]:
    choices = CANDIDATES[op, shape_class] | LAUNCH
    for values in product(*choices.values()):
        yield dict(zip(choices, values, strict=True))


def best(
    op: str, shape_class: str, tried: Sequence[Case], some: Sequence[dict[str, int]], device: torch.device
) -> tuple[dict[str, int], float]:
    """The tile with the least geometric mean over `tried`, and that mean in seconds."""
    found: list[tuple[float, int]] = []
    for index, tile in enumerate(some):
        with tiles.force(op, shape_class, tile):
            try:
                seconds = [seconds_of(case.calls, device) for case in tried]
            except Exception as error:
                # Whatever the compiler or the device says of this one, others may do.
                print(json.dumps({"op": op, "class": shape_class, "tile": tile, "error": type(error).__name__}))
                continue
        found.append((float(torch.tensor(seconds).log().mean().exp()), index))
    if not found:
        raise RuntimeError(f"no tile of {op} {shape_class} runs here")
    mean, index = min(found)
    return some[index], mean


def merged(document: dict[str, Any], hardware: str, tuned: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The table with `tuned` entries in place of what it had for their keys."""
    keys = {(entry["op"], entry["class"], entry["architecture"]) for entry in tuned}
    kept = [e for e in document["tiles"] if (e["op"], e["class"], e["architecture"]) not in keys]
    names = [name for name in document["hardware"].split("; ") if name != "untuned defaults"]
    return {"hardware": "; ".join(dict.fromkeys([*names, hardware])), "tiles": [*kept, *tuned]}


def written(document: dict[str, Any]) -> str:
    """One entry a line, so that a change is a line of a diff."""
    lines = ",\n".join("    " + json.dumps(entry) for entry in document["tiles"])
    return f'{{\n  "hardware": {json.dumps(document["hardware"])},\n  "tiles": [\n{lines}\n  ]\n}}\n'


def rows(
    model: ModelShape,
    steps: dict[str, StepShape],
    generator: torch.Generator,
    hardware: str,
    table: Path,
    limit: int | None = None,
) -> Iterator[dict[str, object]]:
    """One a chosen tile, written into `table` at once: what was found stays when the next is interrupted.

    `limit`: candidates tried of each.
    """
    device = generator.device
    architecture = tiles.ANY if device.type == "cpu" else tiles.architecture_of(device)
    with dispatch.force("triton"), torch.inference_mode():
        for op, shape_class in CANDIDATES:
            all_cases = cases(model, steps[shape_class], torch.bfloat16, generator)
            mine = [case for case in all_cases if case.op == op]
            some = list(candidates(op, shape_class))[:limit]
            tile, seconds = best(op, shape_class, mine, some, device)
            chosen = {"op": op, "class": shape_class, "architecture": architecture, "tile": tile}
            table.write_text(written(merged(json.loads(table.read_text()), hardware, [chosen])))
            yield {**chosen, "microseconds": round(1e6 * seconds, 2)}
