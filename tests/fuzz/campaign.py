"""Runs a fuzzing process over a seeded corpus and says what it did: counts, and coverage of the parser."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from tests.checkout import ROOT
from tests.fuzz.targets import TARGETS, Counts, Target

# One seed, so that a campaign of a given length on a given machine is nearly the same each time.
SEED = 20
INPUT_SECONDS = 5
MAX_INPUT_BYTES = 8192


@dataclass(frozen=True)
class Report:
    """`finding` is the end of libFuzzer's output when it found something, else empty."""

    counts: Counts
    coverage: float
    finding: str

    @property
    def parsed_share(self) -> float:
        return self.counts.parsed / max(1, self.counts.inputs)


def run_campaign(name: str, seconds: int, folder: Path) -> Report:
    """Fuzzes one target for so long; new inputs, and what crashes, go to `folder`."""
    target, corpus, stats = TARGETS[name], folder / "corpus", folder / "stats.json"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds()):
        (corpus / f"seed-{number:02d}").write_bytes(seed)
    command = [sys.executable, "-m", "tests.fuzz.run", name, str(stats), str(corpus)]
    command += [f"-max_total_time={seconds}", f"-seed={SEED}", f"-timeout={INPUT_SECONDS}"]
    command += [f"-max_len={MAX_INPUT_BYTES}", f"-artifact_prefix={folder}/"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", check=False)
    counts = Counts(**json.loads(stats.read_text())) if stats.exists() else Counts()
    finding = result.stderr[-2000:] if result.returncode else ""
    return Report(counts, coverage(target, corpus), finding)


def coverage(target: Target, corpus: Path) -> float:
    """Share of the parser's lines that the corpus runs."""
    ran: set[tuple[str, int]] = set()
    codes: set[CodeType] = set()

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if Path(frame.f_code.co_filename).name not in target.parser:
            return None
        codes.add(frame.f_code)
        ran.add((frame.f_code.co_filename, frame.f_lineno))
        return trace

    files = sorted(corpus.iterdir())
    sys.settrace(trace)
    try:
        for file in files:
            target.run(file.read_bytes(), Counts())
    finally:
        sys.settrace(None)
    lines = {line for code in _parser_codes(target, codes) for line in _lines(code)}
    return len(lines & ran) / len(lines)


def _parser_codes(target: Target, seen: set[CodeType]) -> Iterator[CodeType]:
    """Every function of the parser's files, run or not."""
    for name in {code.co_filename for code in seen}:
        module = compile(Path(name).read_text(), name, "exec")
        yield from _functions(module, target.left_out)


def _functions(code: CodeType, left_out: frozenset[str]) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType) and constant.co_name not in left_out:
            is_class = "__module__" in constant.co_names and "__qualname__" in constant.co_names
            if not is_class:
                yield constant
            yield from _functions(constant, left_out)


def _lines(code: CodeType) -> set[tuple[str, int]]:
    found = {line for _, _, line in code.co_lines() if line is not None and line != code.co_firstlineno}
    return {(code.co_filename, line) for line in found}
