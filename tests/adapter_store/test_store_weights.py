import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.numpy import load

from adapter_store.effects import squared_norm, squared_norm_of_bits
from adapter_store.modules import pair_tensors
from adapter_store.packed import write_packed
from adapter_store.peft_config import parse_config
from adapter_store.weights import ELEMENTS, MAX_HEADER_BYTES, TensorInfo, is_finite, read_header, widen
from common.errors import InvalidArgument
from common.packing import ModuleSpec, plan
from tests.adapter_store.crafted import (
    Tensors,
    make_config,
    make_header,
    make_tensors,
    make_weights,
    tensor_name,
    with_header,
)

A, B = tensor_name(1, "q_proj", "A"), tensor_name(1, "q_proj", "B")


def one_module() -> Tensors:
    return make_tensors(modules=("q_proj",))


def read(data: bytes) -> list[TensorInfo]:
    return read_header(io.BytesIO(data), len(data))


def spoiled(**changes: dict[str, Any]) -> bytes:
    """One module's weights; `A` and `B` change entries of these tensors in the header."""
    tensors = one_module()
    header = make_header(tensors)
    header[A] |= changes.get("A", {})
    header[B] |= changes.get("B", {})
    return make_weights(tensors, header)


def test_a_true_file_is_read() -> None:
    data = make_weights(one_module())
    header_bytes = struct.unpack("<Q", data[:8])[0]
    assert read(data) == [
        TensorInfo(A, "float32", (3, 48), 8 + header_bytes, 8 + header_bytes + 576),
        TensorInfo(B, "float32", (48, 3), 8 + header_bytes + 576, len(data)),
    ]


A_BYTES, ALL_BYTES = 576, 1152


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        pytest.param(b"", "too few", id="empty"),
        pytest.param(b"\x80\x04\x95abc", "too few", id="short"),
        pytest.param(b"\x80\x04\x95\x10\0\0\0\0pickle", "is this a safetensors file", id="pickle"),
        pytest.param(struct.pack("<Q", 2**63), "limit is 2097152", id="length-2-63"),
        pytest.param(struct.pack("<Q", MAX_HEADER_BYTES + 1), "limit is 2097152", id="length-over-limit"),
        pytest.param(with_header(b"{}", b""), "0 tensors", id="no-tensors"),
        pytest.param(with_header(b" {}", b""), "does not start with", id="leading-space"),
        pytest.param(with_header(b"[]", b""), "does not start with", id="list"),
        pytest.param(with_header(b'{"a"', b""), "not valid JSON", id="bad-json"),
        pytest.param(with_header(b'{"a": {"a": {"a": []}}}', b""), "deeper than 3", id="deep"),
        pytest.param(with_header(b'{"__metadata__": {"a": 1}}', b""), "__metadata__", id="metadata-not-text"),
        pytest.param(with_header(b'{"__metadata__": []}', b""), "__metadata__", id="metadata-not-object"),
        pytest.param(with_header(b'{"a": 1}', b""), "dtype, shape and data_offsets", id="tensor-not-object"),
        pytest.param(make_weights(one_module()) + b"x", "the tensors end at byte", id="trailing-byte"),
        pytest.param(make_weights(one_module())[:-1], "the tensors end at byte", id="truncated"),
        pytest.param(make_weights(one_module())[:30], "the file ends after", id="header-truncated"),
        pytest.param(spoiled(A={"dtype": "F64"}), "dtype 'F64'", id="f64"),
        pytest.param(spoiled(A={"dtype": "I8"}), "dtype 'I8'", id="i8"),
        pytest.param(spoiled(A={"dtype": ["F32"]}), "dtype", id="dtype-list"),
        pytest.param(spoiled(A={"extra": 1}), "nothing else", id="extra-key"),
        pytest.param(spoiled(A={"shape": [144]}), "two sizes", id="rank-1"),
        pytest.param(spoiled(A={"shape": [3, 48, 1]}), "two sizes", id="rank-3"),
        pytest.param(spoiled(A={"shape": [0, 48]}), "two sizes", id="zero-size"),
        pytest.param(spoiled(A={"shape": [-3, -48]}), "two sizes", id="negative-size"),
        pytest.param(spoiled(A={"shape": [3.0, 48]}), "two sizes", id="float-size"),
        pytest.param(spoiled(A={"shape": [True, 144]}), "two sizes", id="boolean-size"),
        pytest.param(spoiled(A={"shape": [2**62, 4]}), "its shape and dtype need", id="overflowing-shape"),
        pytest.param(spoiled(A={"shape": [4, 48]}), "its shape and dtype need 768", id="shape-over-span"),
        pytest.param(spoiled(A={"data_offsets": [A_BYTES, 0]}), "a start and an end", id="backwards"),
        pytest.param(spoiled(A={"data_offsets": [-4, A_BYTES - 4]}), "a start and an end", id="negative-offset"),
        pytest.param(spoiled(A={"data_offsets": [0, 2**62]}), "spans 4611686018427387904 bytes", id="offset-2-62"),
        pytest.param(spoiled(B={"data_offsets": [0, A_BYTES]}), "overlaps", id="same-place"),
        pytest.param(spoiled(B={"data_offsets": [A_BYTES - 4, ALL_BYTES - 4]}), "overlaps", id="overlap"),
        pytest.param(spoiled(B={"data_offsets": [A_BYTES + 4, ALL_BYTES + 4]}), "leaves a gap", id="gap"),
        pytest.param(spoiled(A={"data_offsets": [4, A_BYTES + 4]}), "leaves a gap", id="gap-at-start"),
        pytest.param(
            make_weights(one_module() | {B: one_module()[B].astype(np.float16)}), "all must be one", id="mixed-dtypes"
        ),
        pytest.param(make_weights({"x" * 257: np.ones((1, 1), np.float32)}), "257 characters", id="long-name"),
    ],
)
def test_a_spoiled_file_is_refused(data: bytes, problem: str) -> None:
    with pytest.raises(InvalidArgument, match=problem) as caught:
        read(data)
    assert caught.value.reason == "WEIGHTS_INVALID"


def test_a_tensor_named_twice_is_refused() -> None:
    entry = '"a": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}'
    with pytest.raises(InvalidArgument, match="the key 'a' twice"):
        read(with_header(f"{{{entry}, {entry}}}".encode(), bytes(4)))


def test_a_great_many_tensors_are_refused() -> None:
    entries = {f"t{i}": {"dtype": "F32", "shape": [1, 1], "data_offsets": [i * 4, i * 4 + 4]} for i in range(14337)}
    with pytest.raises(InvalidArgument, match="14337 tensors"):
        read(with_header(json.dumps(entries).encode(), b""))


SEEDS = [make_weights(one_module()), make_weights({"a": np.ones((1, 2), np.float16)}), spoiled(A={"shape": [6, 24]})]


@given(st.sampled_from(SEEDS), st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=3)), max_size=3))
def test_whatever_is_accepted_the_safetensors_library_accepts(seed: bytes, edits: list[tuple[int, bytes]]) -> None:
    data = seed
    for place, patch in edits:
        data = data[:place] + patch + data[place + len(patch) :]
    try:
        tensors = read(data)
    except InvalidArgument:
        return
    try:
        accepted = load(data)
    except SafetensorError:
        pytest.fail("the safetensors library refuses it")
    assert {tensor.name: tensor.shape for tensor in tensors} == {name: a.shape for name, a in accepted.items()}


def pair(tensors: Tensors, **changes: Any) -> object:
    return pair_tensors(read(make_weights(tensors)), parse_config(json.dumps(make_config(**changes)).encode()))


def renamed(old: str, new: str) -> Tensors:
    return {name.replace(old, new): tensor for name, tensor in one_module().items()}


@pytest.mark.parametrize(
    "tensors",
    [
        pytest.param(renamed("q_proj", "qq_proj"), id="misspelt"),
        pytest.param(renamed("self_attn", "mlp"), id="wrong-group"),
        pytest.param(renamed("base_model.model.", ""), id="no-prefix"),
        pytest.param(renamed("lora_A", "lora_magnitude_vector"), id="dora"),
        pytest.param(renamed("lora_B.weight", "lora_B.bias"), id="bias"),
        pytest.param(renamed("layers.1.", "layers.01."), id="leading-zero"),
        pytest.param(renamed("layers.1.", "layers.12345."), id="many-layers"),
        pytest.param(renamed(".weight", ".weight\n"), id="newline"),
        pytest.param(renamed(".weight", ".other.weight"), id="other-adapter-name"),
        pytest.param(one_module() | {"lm_head.weight": np.ones((1, 1), np.float32)}, id="lm-head"),
    ],
)
def test_an_unknown_tensor_is_named(tensors: Tensors) -> None:
    with pytest.raises(InvalidArgument, match=r"the tensor '.*' is unknown") as caught:
        pair(tensors)
    assert caught.value.reason == "TENSOR_UNKNOWN"


@pytest.mark.parametrize(("left_out", "missing"), [(A, "lora_A"), (B, "lora_B")], ids=["a", "b"])
def test_a_tensor_alone_is_named(left_out: str, missing: str) -> None:
    tensors = one_module()
    del tensors[left_out]
    with pytest.raises(InvalidArgument, match=rf"q_proj.* has no {missing} beside it"):
        pair(tensors)


def test_a_module_under_two_names_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="are the same one") as caught:
        pair(one_module() | renamed(".weight", ".default.weight"))
    assert caught.value.reason == "TENSOR_DUPLICATE"


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"target_modules": ["k_proj"]}, id="other-target"),
        pytest.param({"target_modules": []}, id="no-target"),
        pytest.param({"layers_to_transform": 0}, id="other-layer"),
        pytest.param({"layers_to_transform": [0, 2]}, id="other-layers"),
        pytest.param({"exclude_modules": ["q_proj"]}, id="excluded"),
    ],
)
def test_a_tensor_that_peft_would_not_use_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match=r"the tensor '.*q_proj.*' belongs to a module") as caught:
        pair(one_module(), **changes)
    assert caught.value.reason == "TENSOR_UNUSED"


def test_packing_in_another_order_than_the_layouts_is_an_error(tmp_path: Path) -> None:
    specs = [ModuleSpec(layer, "q_proj", 1, 1.0, 2, 2) for layer in (0, 1)]
    ones = np.ones((1, 2), np.float32), np.ones((2, 1), np.float32)
    with pytest.raises(ValueError, match="q_proj of layer 1 comes where"):
        write_packed(tmp_path, plan(specs, "float32"), [(spec, *ones) for spec in reversed(specs)])


@pytest.mark.parametrize(
    ("lora_rank", "in_features", "out_features"), [(1, 1, 1), (3, 50, 20), (64, 5, 7), (9, 1, 300)]
)
def test_the_norm_of_a_product_needs_no_product(lora_rank: int, in_features: int, out_features: int) -> None:
    random = np.random.default_rng(0)
    a, b = random.normal(size=(lora_rank, in_features)), random.normal(size=(out_features, lora_rank))
    assert squared_norm(a, b) == pytest.approx(float(np.sum((b @ a) ** 2)), rel=1e-12)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_the_norm_of_values_that_float32_cannot_multiply(size: float) -> None:
    values = np.random.default_rng(0).normal(size=(2, 40)).astype(np.float32) * np.float32(size)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    a, b = bits[:, :25], bits[:, 25:].T
    wide_a, wide_b = (((part.astype(np.uint32) << 16).view(np.float32)).astype(np.float64) for part in (a, b))
    expected = float(np.sum((wide_b @ wide_a) ** 2))
    # Sums of 40 products in float32.
    assert squared_norm_of_bits(a, b, "bfloat16") == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", list(ELEMENTS))
def test_what_is_finite_is_told_by_the_bits(dtype: str) -> None:
    """Every pattern of 16 bits, and of the upper 16 of 32."""
    patterns = np.arange(2**16, dtype=np.uint32)
    bits = patterns << 16 if dtype == "float32" else patterns
    data = bits.astype("<u4" if dtype == "float32" else "<u2").view(ELEMENTS[dtype])
    finite = [is_finite(data[place : place + 1], dtype) for place in range(2**16)]
    assert finite == list(np.isfinite(widen(data, dtype)))
