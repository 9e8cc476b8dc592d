"""What is read from a checkpoint folder without torch."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from common import base_model

CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 128,
    "eos_token_id": 2,
}


def write_safetensors(path: Path, header: dict[str, Any], body: bytes = b"") -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A checkpoint with one weight file."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    write_safetensors(
        tmp_path / "model.safetensors", {"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"0123"
    )
    return tmp_path


@pytest.fixture
def sharded_dir(tmp_path: Path) -> Path:
    """A checkpoint whose index names two shards; "b" comes first in it."""
    shards = {"x": "b.safetensors", "y": "a.safetensors", "z": "b.safetensors"}
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    for name in set(shards.values()):
        write_safetensors(tmp_path / name, {})
    return tmp_path


def test_a_missing_config_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        base_model.read_config(tmp_path)


@pytest.mark.parametrize(("text", "sentence"), [("{", "not valid JSON"), ("[]", "does not hold a JSON object")])
def test_a_broken_config_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        base_model.read_config(tmp_path)


def test_the_geometry_is_read_from_the_config() -> None:
    assert base_model.geometry(CONFIG) == base_model.BaseGeometry(2, 64, 96, 4, 2, 16, 100, 128)


def test_without_kv_heads_every_head_has_its_own() -> None:
    config = {key: value for key, value in CONFIG.items() if key != "num_key_value_heads"}
    assert base_model.geometry(config).num_kv_heads == 4


def test_a_written_head_dim_wins_over_the_quotient() -> None:
    assert base_model.geometry({**CONFIG, "head_dim": 32}).head_dim == 32


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings"])
def test_a_missing_field_is_named(field: str) -> None:
    config = {key: value for key, value in CONFIG.items() if key != field}
    with pytest.raises(ValueError, match=f"no '{field}'"):
        base_model.geometry(config)


def test_module_shapes_follow_grouped_query_attention() -> None:
    shapes = base_model.geometry(CONFIG).module_shapes
    assert (shapes["q_proj"], shapes["k_proj"], shapes["down_proj"]) == ((64, 64), (64, 32), (96, 64))


def test_generation_config_wins_over_config_for_eos(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert base_model.eos_token_ids(tmp_path, CONFIG) == (5, 6)


def test_eos_comes_from_config_when_generation_config_has_none(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("{}")
    assert base_model.eos_token_ids(tmp_path, CONFIG) == (2,)


def test_a_model_without_eos_has_no_ids(tmp_path: Path) -> None:
    assert base_model.eos_token_ids(tmp_path, {}) == ()


def test_an_eos_id_of_zero_counts(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 0}')
    assert base_model.eos_token_ids(tmp_path, CONFIG) == (0,)


def test_a_single_weight_file_is_found(model_dir: Path) -> None:
    assert base_model.weight_files(model_dir) == [model_dir / "model.safetensors"]


def test_the_shards_of_an_index_are_found_once_each_and_sorted(sharded_dir: Path) -> None:
    assert [path.name for path in base_model.weight_files(sharded_dir)] == ["a.safetensors", "b.safetensors"]


def test_a_missing_shard_is_named(sharded_dir: Path) -> None:
    (sharded_dir / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"shard b\.safetensors"):
        base_model.weight_files(sharded_dir)


def test_a_shard_outside_the_folder_is_refused(sharded_dir: Path) -> None:
    outside = sharded_dir.parent / "outside.safetensors"
    outside.write_bytes(b"")
    (sharded_dir / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../outside.safetensors"}}')
    with pytest.raises(ValueError, match="is missing"):
        base_model.weight_files(sharded_dir)


def test_other_weight_formats_are_refused(model_dir: Path) -> None:
    (model_dir / "model.safetensors").rename(model_dir / "pytorch_model.bin")
    with pytest.raises(ValueError, match="other weight formats are refused"):
        base_model.weight_files(model_dir)


def test_the_fingerprint_ignores_weight_values(model_dir: Path) -> None:
    before = base_model.fingerprint(model_dir)
    weights = model_dir / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"4567")
    assert base_model.fingerprint(model_dir) == before


def test_the_fingerprint_depends_on_the_config(model_dir: Path) -> None:
    before = base_model.fingerprint(model_dir)
    (model_dir / "config.json").write_text(json.dumps({**CONFIG, "rope_theta": 5e5}))
    assert base_model.fingerprint(model_dir) != before


def test_the_fingerprint_depends_on_the_headers(model_dir: Path) -> None:
    before = base_model.fingerprint(model_dir)
    write_safetensors(model_dir / "model.safetensors", {"v": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})
    assert base_model.fingerprint(model_dir) != before


@pytest.mark.parametrize(
    ("content", "sentence"), [(b"1234", "too short"), (b"\xff" * 8, "the limit is")], ids=["short", "huge header"]
)
def test_a_broken_weight_file_has_no_fingerprint(model_dir: Path, content: bytes, sentence: str) -> None:
    (model_dir / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        base_model.fingerprint(model_dir)


def test_tokenizer_files_are_those_that_exist(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    (tmp_path / "chat_template.jinja").write_bytes(b"t")
    (tmp_path / "notes.txt").write_bytes(b"n")
    assert base_model.tokenizer_files(tmp_path) == {"tokenizer.json": b"{}", "chat_template.jinja": b"t"}


def test_a_folder_without_a_fast_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        base_model.tokenizer_files(tmp_path)


def test_the_tokenizer_digest_ignores_the_order_of_files() -> None:
    assert base_model.tokenizer_digest({"a": b"1", "b": b"2"}) == base_model.tokenizer_digest({"b": b"2", "a": b"1"})


@pytest.mark.parametrize("files", [{"a": b"12"}, {"b": b"1"}, {"a": b"1", "b": b""}])
def test_the_tokenizer_digest_depends_on_names_and_contents(files: dict[str, bytes]) -> None:
    assert base_model.tokenizer_digest(files) != base_model.tokenizer_digest({"a": b"1"})
