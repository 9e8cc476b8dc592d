"""Compiles a launch for an architecture that need not be here, and says what it costs.

The types, the alignments and the constants are those that the launch itself would be specialised to, so what is
compiled is what a GPU would run. Tensors may be on the "meta" device.
"""

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from kernels.gpu.launch import Argument, Launch

WARP_SIZE = 32
# What Triton takes for granted of a pointer or an integer that is a multiple of it.
DIVISOR = 16
_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
}
_USED = re.compile(r"Used (\d+) registers")
_SPILLED = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


@dataclass(frozen=True, slots=True)
class Resources:
    """registers: of a thread. shared_bytes: of a program. spill_bytes: stores and loads of a thread."""

    registers: int
    shared_bytes: int
    spill_bytes: int


def compile_launch(launch: Launch, architecture: str) -> Resources:
    """`architecture` as in "sm_90"."""
    capability = int(architecture.removeprefix("sm_"))
    signature, constants, attributes = _specialised(launch)
    source = ASTSource(launch.kernel, signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, WARP_SIZE), options=options)
    registers, spill_bytes = _assemble(compiled.asm["ptx"], capability)
    return Resources(registers, compiled.metadata.shared, spill_bytes)


def _specialised(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], list[list[Any]]]]:
    """Signature, constants and attributes as Triton's JIT makes them from the arguments of a call."""
    varying = set(launch.kernel.do_not_specialize or ())
    signature: dict[str, str] = {}
    constants = dict(launch.constants)
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for position, name in enumerate(launch.kernel.arg_names):
        if name in launch.constants:
            signature[name] = "constexpr"
            continue
        argument = launch.arguments[name]
        if isinstance(argument, int) and argument == 1 and name not in varying:
            signature[name], constants[name] = "constexpr", 1
            continue
        signature[name] = _type_of(argument)
        if name not in varying and _is_aligned(argument):
            attributes[position,] = [["tt.divisibility", DIVISOR]]
    return signature, constants, attributes


def _type_of(argument: Argument) -> str:
    if isinstance(argument, Tensor):
        return f"*{_TYPES[argument.dtype]}"
    if isinstance(argument, float):
        return "fp32"
    return "i32" if argument is not None and -(2**31) <= argument < 2**31 else "i64"


def _is_aligned(argument: Argument) -> bool:
    """Storages begin on 16 bytes and more; an offset into one must keep that."""
    if isinstance(argument, Tensor):
        return argument.storage_offset() * argument.itemsize % DIVISOR == 0
    return isinstance(argument, int) and argument % DIVISOR == 0


def _assemble(ptx: str, capability: int) -> tuple[int, int]:
    """(registers, spilled bytes) from the assembler that ships with Triton."""
    tool = get_ptxas(capability).path
    suffix = "a" if capability >= 90 else ""
    with TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [tool, "-v", f"--gpu-name=sm_{capability}{suffix}", str(source), "-o", f"{folder}/kernel.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    used, spilled = _USED.search(said), _SPILLED.search(said)
    if used is None or spilled is None:
        raise RuntimeError(f"ptxas said nothing of registers or spills: {said}")
    return int(used[1]), int(spilled[1]) + int(spilled[2])


def resources_of(launches: Mapping[str, Launch], architecture: str) -> dict[str, Resources]:
    return {name: compile_launch(launch, architecture) for name, launch in launches.items()}
