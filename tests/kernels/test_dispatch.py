"""Which backend runs, and what happens without a compiled library."""

import logging
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from kernels import build, dispatch
from kernels.cpu import library
from kernels.linear import linear, pack
from kernels.paged_attention import cpu as paged_attention_cpu
from kernels.silu_and_mul import silu_and_mul
from kernels.silu_and_mul.reference import silu_and_mul_reference
from tests.checkout import ROOT

OP = "silu_and_mul"


@pytest.fixture
def fresh_library() -> Iterator[None]:
    library.library.cache_clear()
    yield
    library.library.cache_clear()


@pytest.fixture
def no_library(fresh_library: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "library_path", lambda: tmp_path / "missing.so")


def calls_of(x: torch.Tensor) -> Counter[tuple[str, str]]:
    before = dispatch.calls.copy()
    silu_and_mul(x)
    return dispatch.calls - before


def test_the_compiled_kernel_is_the_one_in_use() -> None:
    assert calls_of(torch.ones(2, 16)) == {(OP, "cpu"): 1}


def test_the_reference_runs_when_forced() -> None:
    with dispatch.force("reference"):
        assert calls_of(torch.ones(2, 16)) == {(OP, "reference"): 1}
    assert calls_of(torch.ones(2, 16)) == {(OP, "cpu"): 1}


def test_tensors_that_the_kernel_does_not_take_go_to_the_reference() -> None:
    strided = torch.ones(2, 32)[:, ::2]
    assert calls_of(strided) == {(OP, "reference"): 1}
    with dispatch.force("cpu"), pytest.raises(RuntimeError, match="does not take these tensors"):
        silu_and_mul(strided)


def test_a_weight_that_is_not_packed_goes_to_the_reference() -> None:
    with dispatch.force("cpu"), pytest.raises(RuntimeError, match="does not take these tensors"):
        linear(torch.ones(1, 4), torch.ones(16, 4))


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="'fast'; known: reference, cpu, triton"), dispatch.force("fast"):
        pass


@pytest.mark.parametrize(("installed", "why"), [(False, "not installed"), (True, "are on cpu")])
def test_triton_does_not_take_tensors_on_the_cpu(installed: bool, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "installed", lambda package: installed)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert calls_of(torch.ones(2, 16)) == {(OP, "cpu"): 1}
    with dispatch.force("triton"), pytest.raises(RuntimeError, match=why):
        silu_and_mul(torch.ones(2, 16))


@pytest.mark.parametrize(("installed", "chosen"), [(False, False), (True, True)], ids=["without-triton", "with-triton"])
def test_tensors_on_a_gpu_go_to_triton_where_it_is_installed(
    installed: bool, chosen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "installed", lambda package: installed)
    on_a_gpu = cast(torch.Tensor, SimpleNamespace(is_cuda=True, device="cuda:0"))
    assert dispatch.use_triton(OP, on_a_gpu) is chosen
    with dispatch.force("reference"):
        assert not dispatch.use_triton(OP, on_a_gpu)


@pytest.mark.usefixtures("no_library")
def test_without_a_library_the_reference_runs_and_one_line_says_so(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    x = torch.randn(3, 16)
    for _ in range(3):
        assert calls_of(x) == {(OP, "reference"): 1}
        assert torch.equal(silu_and_mul(x), silu_and_mul_reference(x))
    assert not dispatch.available()
    assert [record.message for record in caplog.records] == [
        "the CPU kernels are not compiled (`make install` does it when there is a C++ compiler); "
        "the plain torch kernels are used, several times slower"
    ]


@pytest.mark.usefixtures("no_library")
def test_without_a_library_a_packed_weight_still_multiplies() -> None:
    x, weight = torch.randn(3, 8), torch.randn(32, 8)
    assert torch.equal(linear(x, pack(weight.clone())), torch.nn.functional.linear(x, weight))
    with dispatch.force("cpu"), pytest.raises(RuntimeError, match="it is not there"):
        linear(x, pack(weight))


@pytest.mark.usefixtures("fresh_library")
def test_a_library_that_does_not_load_is_announced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "broken.so").write_text("no library")
    monkeypatch.setattr(library, "library_path", lambda: tmp_path / "broken.so")
    assert library.library() is None
    assert "the compiled CPU kernels do not load" in caplog.text


@pytest.mark.usefixtures("fresh_library")
def test_a_cpu_without_avx2_is_announced(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert library.library() is None
    assert "the CPU kernels need AVX2" in caplog.text


def test_the_environment_forces_a_backend() -> None:
    command = [sys.executable, "-c", "from kernels import dispatch; print(dispatch.available())"]
    environment = {"LORAPLEX_KERNELS": "reference", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)
    assert result.stdout.strip() == "False", result.stderr


def test_the_kernels_share_the_thread_pool_of_torch() -> None:
    library.library()
    maps = Path("/proc/self/maps").read_text()
    assert len({line.split()[-1] for line in maps.splitlines() if "libgomp" in line}) == 1


def test_the_name_of_the_library_follows_the_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "HERE", tmp_path)
    source = tmp_path / "op" / "cpu.cpp"
    source.parent.mkdir()
    source.write_text("int one() { return 1; }")
    before = build.library_path()
    source.write_text("int two() { return 2; }")
    assert build.library_path() != before


def test_a_build_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "HERE", tmp_path)
    monkeypatch.setattr(build, "LIBRARIES", tmp_path)
    with pytest.raises(subprocess.CalledProcessError):
        build.build("false")
    assert list(tmp_path.iterdir()) == []


def test_without_a_compiler_the_build_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build, "which", lambda name: None)
    build.main()
    assert "no C++ compiler" in capsys.readouterr().err


def test_indices_of_another_width_are_never_read_as_if_they_were_right() -> None:
    query, pages = torch.randn(1, 2, 8), torch.randn(1, 1, 2, 4, 2, 8)
    table, starts, contexts = torch.zeros(1, 1), torch.tensor([0, 1]), torch.tensor([3])
    for dtype, supported in ((torch.int32, True), (torch.int64, False)):
        indices = [tensor.to(dtype) for tensor in (table, starts, contexts)]
        assert paged_attention_cpu.supports(query, pages, *indices) is supported


def test_a_row_that_does_not_fit_the_weight_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(torch.ones(2, 9), pack(torch.ones(16, 8)))
