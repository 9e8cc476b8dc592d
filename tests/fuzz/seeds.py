"""Where the fuzzers start: true files, and files that are wrong in one way each."""

import json
import struct
from typing import Any

import numpy as np

from tests.adapter_store.crafted import make_config, make_header, make_tensors, make_weights, tensor_name, with_header

A = tensor_name(1, "q_proj", "A")


def header_seeds() -> list[bytes]:
    """safetensors files."""
    tensors = make_tensors(modules=("q_proj",))
    as_float16 = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
    as_bfloat16 = {name: (tensor.view(np.uint32) >> 16).astype(np.uint16) for name, tensor in tensors.items()}
    true = make_header(tensors)
    entry = '"a": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}'
    spoilt: list[dict[str, Any]] = [
        {"dtype": "F64"},
        {"dtype": 1},
        {"shape": [144]},
        {"shape": [4, 48]},
        {"shape": [0, 48]},
        {"data_offsets": [4, 0]},
        {"data_offsets": [4, 580]},
        {"data_offsets": [576, 1152]},
        {"extra": 1},
    ]
    headers = [
        b"{}",
        b" {}",
        b"[]",
        b'{"a": 1}',
        b'{"a"',
        b'{"a": "\xff"}',
        b'{"\\ud800": {}}',
        b'{"__metadata__": {"format": "pt"}, ' + entry.encode() + b"}",
        b'{"__metadata__": {"format": 1}}',
        f"{{{entry}, {entry}}}".encode(),
        entry.join("{}").replace("[1, 1]", "[-0, 1]").encode(),
        entry.join("{}").replace("[1, 1]", "[NaN, 1]").encode(),
        entry.join("{}").replace("[1, 1]", f"[{'9' * 30}, 1]").encode(),
        b'{"a": {"a": {"a": {"a": []}}}}',
        json.dumps({"x" * 300: true[A]}).encode(),
    ]
    whole = [make_weights(kind) for kind in (tensors, as_float16, as_bfloat16)]
    whole += [make_weights(tensors | {A: as_float16[A]}), whole[0] + b"x", whole[0][:-1], whole[0][:40], b"", b"1234"]
    whole += [make_weights(tensors, true | {A: true[A] | change}) for change in spoilt]
    return [*whole, struct.pack("<Q", 2**63), *(with_header(header, bytes(4)) for header in headers)]


def config_seeds() -> list[bytes]:
    """adapter_config.json files."""
    changes: list[dict[str, Any]] = [
        {},
        {"r": 0},
        {"r": "8"},
        {"lora_alpha": 1e308},
        {"lora_alpha": None},
        {"use_rslora": True},
        {"use_rslora": 1},
        {"use_dora": True},
        {"bias": "all"},
        {"peft_type": "IA3"},
        {"modules_to_save": ["lm_head"]},
        {"init_lora_weights": "pissa"},
        {"new_setting": 1},
        {"rank_pattern": {"q_proj": 4, "^model.layers.0": 2}},
        {"rank_pattern": {"(a+)+$": 4}},
        {"rank_pattern": []},
        {"alpha_pattern": {"v_proj": 40}},
        {"target_modules": "all-linear"},
        {"target_modules": ["lm_head"]},
        {"target_modules": [1]},
        {"exclude_modules": ["k_proj"]},
        {"layers_to_transform": 1},
        {"layers_to_transform": [0, 1]},
        {"layers_to_transform": ["1"]},
        {"base_model_name_or_path": None},
        {"base_model_name_or_path": "x" * 2000},
        {"auto_mapping": {"base_model_class": "X"}},
    ]
    return [json.dumps(make_config(**change)).encode() for change in changes] + [b"", b"[]", b"{", b'{"r": 1, "r": 1}']
