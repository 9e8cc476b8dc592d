"""The peak that speeds are held against is one that the machine really reaches."""

import re
from pathlib import Path

import pytest

from benchmarks.kernels.machine import CHAINS, compile_fma


@pytest.mark.parametrize(("loop", "register"), [("fma_eight", "ymm"), ("fma_sixteen", "zmm")])
def test_the_compiler_keeps_every_chain_of_multiply_adds(tmp_path: Path, loop: str, register: str) -> None:
    compile_fma(tmp_path / "fma.s", "-S")
    body = (tmp_path / "fma.s").read_text().split(f"\n{loop}:\n")[1].split("\tret\n")[0]
    assert len(re.findall(rf"\tvfmadd\w+\t.*%{register}", body)) >= CHAINS
