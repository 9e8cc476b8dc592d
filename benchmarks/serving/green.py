"""No number is reported of parts that are wrong: their tests run first, once for each state of their files."""

import hashlib
import subprocess
import sys

from benchmarks.hardware import ROOT
from benchmarks.serving.fixture import FOLDER
from benchmarks.serving.progress import say

# What a run goes through, and what says that it is right.
SERVICES = ("adapter_store", "gateway", "gpu_worker", "scheduler")
TESTS = ("tests/kernels", "tests/gpu_worker/models", "tests/gpu_worker/memory", "tests/benchmarks")
SOURCES = (*SERVICES, *TESTS, "benchmarks/baselines", "common", "kernels", "loraplex")


def tests_are_green() -> bool:
    stamp = FOLDER / "green" / _fingerprint()
    if stamp.exists():
        return True
    say(f"running {', '.join(TESTS)}")
    command = ["make", "test", f"ARGS=-q {' '.join(TESTS)}"]
    if subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False).returncode != 0:
        return False
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.touch()
    return True


def _fingerprint() -> str:
    """Of every source file as it is now, committed or not."""
    digest = hashlib.sha256()
    files = [path for folder in SOURCES for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".cpp", ".h")]
    for path in sorted(files):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
