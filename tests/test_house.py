"""What a stranger meets first is true: README, Makefile, CI script, decision records, and no trace of our machines."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkout import ROOT, read, tree_files

MAX_RECIPE_LINES = 5
MAX_RECORD_LINES = 40
MAX_TYPE_IGNORES = 10

# Put together here so that this file does not hold them itself.
FORBIDDEN_STRINGS = [f"/{folder}/" for folder in ("home", "root", "Users", "work")] + [
    ".".join(parts) for parts in (("pypi", "org"), ("pythonhosted", "org"), ("download", "pytorch"), ("npmjs", "org"))
]
LOCK_FILES = {"Pipfile.lock", "package-lock.json", "poetry.lock", "uv.lock", "yarn.lock"}


def recipes() -> dict[str, list[str]]:
    """Target -> the lines of its recipe."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in read("Makefile").splitlines():
        if match := re.match(r"([a-z][a-z-]*):(?!=)", line):
            lines = found.setdefault(match[1], [])
        elif line.startswith("\t"):
            lines.append(line)
        elif re.match(r"\S", line):
            lines = []
    return found


def targets_in(text: str) -> set[str]:
    """Targets of every `make ...` in a script or a document."""
    commands = re.findall(r"(?:^|`)make ((?:[a-z-]+ ?)+)", text, re.MULTILINE)
    return {target for command in commands for target in command.split()}


def forbidden_strings(data: bytes) -> list[str]:
    return [text for text in FORBIDDEN_STRINGS if re.search(rb"(?<![\w.}])" + re.escape(text.encode()), data)]


def records() -> list[Path]:
    return sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))


@pytest.mark.parametrize("folder", sorted({path.parts[0] for path in tree_files() if len(path.parts) > 1}))
def test_the_readme_names_the_folder(folder: str) -> None:
    assert re.search(rf"(?m)^{re.escape(folder)}/ ", read("README.md"))


def test_the_readme_names_no_folder_that_is_not_there() -> None:
    named = re.findall(r"(?m)^([\w.]+)/ ", read("README.md"))
    assert [folder for folder in named if not (ROOT / folder).is_dir()] == []


@pytest.mark.parametrize("name", [".ci/run", "README.md", "docs/development.md"])
def test_every_make_target_that_is_named_exists(name: str) -> None:
    assert targets_in(read(name)) - recipes().keys() == set()


def test_ci_runs_the_checks_the_tests_and_the_demo() -> None:
    assert targets_in(read(".ci/run")) >= {"check", "test", "demo"}


def test_ci_calls_make_and_nothing_else_of_ours() -> None:
    assert not re.search(r"pytest|mypy|ruff|\.venv|python3? -m", read(".ci/run"))


def test_recipes_are_short() -> None:
    assert {target: lines for target, lines in recipes().items() if len(lines) > MAX_RECIPE_LINES} == {}


def test_every_target_is_in_the_help() -> None:
    undocumented = [target for target in recipes() if not re.search(rf"(?m)^{target}:.*## ", read("Makefile"))]
    assert undocumented == []


def test_no_file_mentions_our_machines_or_registries() -> None:
    found = {str(path): forbidden_strings((ROOT / path).read_bytes()) for path in tree_files()}
    assert {path: texts for path, texts in found.items() if texts} == {}


@pytest.mark.parametrize("text", FORBIDDEN_STRINGS)
def test_a_forbidden_string_is_found(text: str) -> None:
    assert forbidden_strings(f"see {text} for it".encode()) == [text]


def test_no_lock_file_is_kept() -> None:
    assert [path for path in tree_files() if path.name in LOCK_FILES] == []


def test_every_link_in_a_document_leads_somewhere() -> None:
    broken = [
        f"{path}: {target}"
        for path in tree_files()
        if path.suffix == ".md"
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", read(path))
        if not (ROOT / path.parent / target).exists()
    ]
    assert broken == []


def test_decision_records_are_numbered_without_gaps() -> None:
    assert [int(path.name[:4]) for path in records()] == list(range(1, len(records()) + 1))


@pytest.mark.parametrize("record", records(), ids=lambda path: path.stem)
def test_a_decision_record_is_linked_from_its_readme(record: Path) -> None:
    assert f"]({record.name})" in read("docs/decisions/README.md")


@pytest.mark.parametrize("record", records(), ids=lambda path: path.stem)
def test_a_decision_record_fits_on_a_page(record: Path) -> None:
    assert len(read(record).splitlines()) <= MAX_RECORD_LINES


def test_ignored_type_errors_are_few_and_explained() -> None:
    ignores = [
        line.strip()
        for path in tree_files()
        if path.suffix == ".py" and path != Path(__file__).relative_to(ROOT)
        for line in read(path).splitlines()
        if "# type: ignore" in line
    ]
    assert [line for line in ignores if not re.search(r"# type: ignore\[[\w, -]+\]  # \w", line)] == []
    assert len(ignores) <= MAX_TYPE_IGNORES


@pytest.mark.parametrize(("ci", "passes"), [("true", False), ("", True)], ids=["in CI", "elsewhere"])
@pytest.mark.parametrize(
    "skip", ["def test_x(): pytest.skip()", "pytest.skip(allow_module_level=True)"], ids=["test", "module"]
)
def test_a_skipped_test_is_a_failure_in_ci_only(tmp_path: Path, skip: str, ci: str, passes: bool) -> None:
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_passes.py").write_text("def test_y(): pass")
    (tmp_path / "test_skips.py").write_text(f"import pytest\n{skip}")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={tmp_path}"]
    environment = {**os.environ, "CI": ci}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert (result.returncode == 0) is passes, result.stdout
