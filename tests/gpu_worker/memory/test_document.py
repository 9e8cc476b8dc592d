"""docs/memory.md agrees with the code, and the numbers it shows keep what the design promises."""

import xml.etree.ElementTree as ET

import pytest

from benchmarks.memory.geometry import Example, examples, section, tables
from tests.checkout import read


def test_the_tables_of_the_document_are_those_of_the_code() -> None:
    assert section(read("docs/memory.md")) == tables()


def test_another_number_would_be_noticed() -> None:
    document = read("docs/memory.md")
    assert section(document.replace("41,943,040 B", "41,943,041 B")) != tables()


@pytest.mark.parametrize(
    "example", [example for example in examples() if example.lora_rank == 8], ids=lambda it: f"{it.model} {it.targets}"
)
def test_packing_adds_less_than_two_percent(example: Example) -> None:
    assert 0 <= example.overhead <= 0.02


@pytest.mark.parametrize(
    "example",
    [example for example in examples() if (example.lora_rank, example.targets) == (8, "all linear")],
    ids=lambda it: it.model,
)
def test_an_adapter_of_rank_8_wastes_less_than_a_twentieth(example: Example) -> None:
    assert 0 <= example.waste <= 0.05


def test_the_picture_is_one() -> None:
    assert ET.fromstring(read("docs/images/memory.svg")).tag.endswith("svg")
