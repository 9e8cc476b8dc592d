"""A volume with many adapters, written as a store would leave it, and one large adapter to move."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from adapter_store.manifest import write_version
from adapter_store.registry import ModuleEffect, Version
from common.packing import MODULES

TENANT = "bench"
# A decoder of 7 billion parameters.
NUM_LAYERS, HIDDEN, INTERMEDIATE, LORA_RANK = 32, 4096, 11008, 64


def write_volume(data_dir: Path, num_adapters: int) -> None:
    """Manifests of so many adapters, each with a version of its own; their weights are left out."""
    effects = tuple(ModuleEffect(module, NUM_LAYERS, 16, 16, 2**20, 1.5) for module in MODULES)
    model = Version("", "org/base-model-7b", "bfloat16", 80 * 2**20, 160 * 2**20, 16, effects, "")
    (data_dir / "journal").mkdir(parents=True)
    for number in range(1, num_adapters + 1):
        digest = f"{number:064x}"
        folder = data_dir / "objects" / digest
        folder.mkdir(parents=True)
        write_version(folder, replace(model, digest=digest), {})
        record = {"tenant": TENANT, "adapter_id": f"adapter-{number:05d}", "digest": digest, "at": 1e9 + number}
        (data_dir / "journal" / f"{number:020d}").write_text(json.dumps(record))


def write_adapter(folder: Path, num_layers: int = NUM_LAYERS, lora_rank: int = LORA_RANK) -> None:
    """A PEFT folder with an adapter of every module, bfloat16: 320 MB of small random weights with rank 64."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": lora_rank, "lora_alpha": lora_rank, "target_modules": list(MODULES)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    shapes = dict.fromkeys(MODULES, (HIDDEN, HIDDEN))
    shapes |= dict.fromkeys(("gate_proj", "up_proj"), (HIDDEN, INTERMEDIATE)) | {"down_proj": (INTERMEDIATE, HIDDEN)}
    sizes: dict[str, tuple[int, int]] = {}
    for layer in range(num_layers):
        for module, (in_features, out_features) in shapes.items():
            group = "self_attn" if module in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
            name = f"base_model.model.model.layers.{layer}.{group}.{module}.lora"
            sizes[f"{name}_A.weight"] = lora_rank, in_features
            sizes[f"{name}_B.weight"] = out_features, lora_rank
    header, offset = {}, 0
    for name, shape in sizes.items():
        end = offset + 2 * shape[0] * shape[1]
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text, random = json.dumps(header).encode(), np.random.default_rng(0)
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for rows, columns in sizes.values():
            values = random.standard_normal((rows, columns), dtype=np.float32)
            file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
