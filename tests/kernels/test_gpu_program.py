"""`make test-gpu`, `make bench-gpu` and `make tune-gpu` at tiny shapes, from a tree without stubs."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.checkout import ROOT

# What a machine with a GPU must have; whatever else is installed here, it need not, and the stubs neither.
NEEDED = ("torch", "triton", "numpy", "safetensors")
PROGRAM = "import runpy, sys; [sys.modules.__setitem__(name, None) for name in {names}]; sys.argv[0] = 'gpu'; {run}"
OPS = {"rms_norm", "linear", "lora_shrink", "lora_expand", "store_kv", "paged_attention", "silu_and_mul"}


def absent() -> list[str]:
    """Modules of every installed distribution but NEEDED and what these require."""
    needed, found = list(NEEDED), set[str]()
    while needed:
        name = canonicalize_name(needed.pop())
        if name not in found:
            found.add(name)
            with suppress(PackageNotFoundError):
                needed += [Requirement(text).name for text in requires(name) or () if "extra ==" not in text]
    modules = packages_distributions().items()
    return ["loraplex", *(module for module, dists in modules if not found & {canonicalize_name(d) for d in dists})]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = PROGRAM.format(names=absent(), run="runpy.run_module('benchmarks.gpu', run_name='__main__')")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
    )


def rows_of(result: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_what_such_a_machine_lacks_is_lacking_here() -> None:
    assert {"loraplex", "grpc", "google", "transformers", "blake3", "redis", "pytest"} <= set(absent())
    assert not set(NEEDED) & set(absent())


@pytest.mark.triton
@pytest.mark.timeout(600)
def test_parity_and_graphs() -> None:
    rows = rows_of(run("test", "--device", "cpu"))
    assert all(row["passed"] for row in rows)
    assert {row["op"] for row in rows} == {*OPS, "cuda_graph", "no_waits"}
    assert {word for row in rows for word in row["case"].split()} >= {"float32", "bfloat16", "float16", "prefill"}
    assert all({"device", "torch", "triton", "commit", "date"} <= row.keys() for row in rows)


@pytest.mark.triton
@pytest.mark.timeout(600)
def test_benchmark() -> None:
    rows = rows_of(run("bench", "--device", "cpu"))
    assert {row["op"] for row in rows} == {*OPS, "read, copy and product", "decode_step", "prefill_step", "serving"}
    assert all("floor_share" in row or row["op"] == "serving" for row in rows[1:])
    assert {row["backend"] for row in rows if row["op"] in OPS} == {"triton"}
    # each with the figure that it is about
    assert {row["goal"] for row in rows if "goal" in row and row["goal"].split()[0] in row} == {
        *("share_of_copy >= 0.8", "lora_tax <= 0.03", "over_floor <= 1.15", "throughput_share >= 0.95")
    }
    (ratio,) = (row for row in rows if "throughput_share" in row)
    assert ratio["loads"] > 1


@pytest.mark.triton
@pytest.mark.timeout(600)
def test_tuning(tmp_path: Path) -> None:
    table = tmp_path / "tiles.json"
    table.write_text((ROOT / "kernels" / "gpu" / "tiles.json").read_text())
    rows = rows_of(run("tune", "--device", "cpu", "--table", str(table)))
    written = json.loads(table.read_text())
    assert written["hardware"] == "Triton's interpreter on a CPU"
    assert all(
        {name: row[name] for name in ("op", "class", "architecture", "tile")} in written["tiles"] for row in rows
    )


@pytest.mark.triton
@pytest.mark.parametrize("command", ["test", "bench", "tune"])
def test_without_a_gpu_it_ends_at_once_with_a_sentence(command: str) -> None:
    if torch.cuda.is_available():
        raise AssertionError("this test is for machines without a GPU")
    result = run(command)
    assert result.returncode != 0
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "there is no CUDA device here; `--device cpu` runs the same code at tiny shapes in Triton's interpreter, "
        "which says nothing about speed"
    ]


@pytest.mark.gpu
def test_on_a_device() -> None:
    assert all(row["passed"] for row in rows_of(run("test")))
