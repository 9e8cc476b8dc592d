"""Options: sizes people write, combinations that cannot work, and what reaches the engine process."""

from pathlib import Path
from typing import Any

import pytest

from common.config import parse
from gpu_worker.config import EngineConfig, WorkerConfig, engine_arguments, parse_bytes
from gpu_worker.engine_main import EngineProcessConfig


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("100", 100),
        ("1KiB", 1024),
        ("512MiB", 512 * 2**20),
        ("1.5GiB", 3 * 2**29),
        ("2gb", 2_000_000_000),
        (" 3 MB ", 3_000_000),
    ],
)
def test_a_size_is_read(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "lots", "-1", "1e9", "1 TiB", "1.GiB", "GiB", "0x10"])
def test_a_size_that_is_none_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size; write for instance 512MiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_sequences": 0}, r"max_sequences is 0; it must be 1 to max_step_tokens \(512\)"),
        ({"max_sequences": 17, "max_step_tokens": 16}, r"max_sequences is 17; it must be 1 to max_step_tokens \(16\)"),
        ({"page_size": 0}, "page_size is 0; it must be at least 1"),
        ({"memory": "much"}, "'much' is not a size"),
    ],
)
def test_a_value_that_cannot_work_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        EngineConfig(model=Path("model"), **options)


def test_the_engine_gets_every_option_of_its_own() -> None:
    worker = WorkerConfig(
        scheduler="s",
        adapter_store="a",
        model=Path("a model"),
        model_name="-name",
        dtype="bfloat16",
        memory="3MiB",
        page_size=8,
        max_step_tokens=64,
        max_sequences=4,
        threads=2,
    )
    engine = parse(EngineProcessConfig, "engine", ["--pipe=3", *engine_arguments(worker)])
    expected = EngineProcessConfig(
        pipe=3,
        model=Path("a model"),
        model_name="-name",
        dtype="bfloat16",
        memory="3MiB",
        page_size=8,
        max_step_tokens=64,
        max_sequences=4,
        threads=2,
    )
    assert engine == expected
