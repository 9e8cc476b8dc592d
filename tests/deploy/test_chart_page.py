"""docs/chart.md names tests that exist, and says of everything that is not so why not."""

import re

import pytest

from tests.checkout import ROOT, read, tree_files

PAGE = read("docs/chart.md")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.split("|---|---|---|\n")[1].splitlines()
    if not line.startswith("| **")
]


def test_every_test_that_is_named_exists() -> None:
    sources = "".join(read(path) for path in tree_files("tests") if path.suffix == ".py")
    named = re.findall(r"`(test_\w+)`", PAGE)
    assert len(named) > 25
    assert [name for name in named if f"def {name}(" not in sources] == []


def test_every_file_that_is_named_exists() -> None:
    assert [name for name in re.findall(r"`(tests/[\w./]+)`", PAGE) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_every_line_has_a_proof_or_a_reason(row: list[str]) -> None:
    line, state, shown = row
    assert line
    assert state
    assert "`" in shown or "rendered" in shown.lower() or len(shown.split()) >= 4
