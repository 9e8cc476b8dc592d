"""Which kernels a worker runs: the compiled ones where there is a compiler, else plain torch and a word about it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.build import library_path
from loraplex.fleet import Fleet
from loraplex.metrics import fetch_metrics, kernel_calls
from tests.checkout import ROOT, tree_files
from tests.e2e.support import greedy_answers
from tests.e2e.tiny_model import TinyModel, differing

# The packages that a running fleet needs, and the demo.
FOLDERS = ("adapter_store", "common", "examples", "gateway", "gpu_worker", "kernels", "loraplex", "protos", "scheduler")


def test_every_operation_of_a_worker_ran_compiled(tiny: TinyModel, fleet: Fleet) -> None:
    """`make install` compiles where there is a compiler, and every machine that runs the tests has one."""
    assert library_path().exists()
    assert differing(greedy_answers(fleet, tiny.prompts), tiny.answers) == set()
    calls = kernel_calls(fetch_metrics(fleet.workers[0].metrics_address))
    assert calls["cpu"] > 0
    assert calls["reference"] == calls["triton"] == 0


@pytest.fixture(scope="module")
def bare_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout as it is where nothing was compiled, with the generated stubs."""
    tree = tmp_path_factory.mktemp("bare") / "tree"
    for folder in FOLDERS:
        for file in tree_files(folder):
            (tree / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / file, tree / file)
    for stub in (ROOT / "loraplex/v1").glob("*_pb2*.py"):
        shutil.copyfile(stub, tree / "loraplex/v1" / stub.name)
    assert not list(tree.glob("**/*.so"))
    return tree


def run_bare(tree: Path, module: str) -> subprocess.CompletedProcess[str]:
    """Runs a module there, on a machine without a compiler."""
    environment = {key: value for key, value in os.environ.items() if key not in ("CXX", "PYTHONPATH")}
    environment |= {"PATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=300)


def test_the_demo_works_without_a_compiler_and_says_so(bare_tree: Path) -> None:
    built = run_bare(bare_tree, "kernels.build")
    assert built.returncode == 0, built.stderr
    assert "no C++ compiler" in built.stderr
    demo = run_bare(bare_tree, "examples.demo")
    assert demo.returncode == 0, demo.stderr
    assert "the compiled kernels are not in use" in demo.stdout
