"""Loads the compiled kernels and says what they take.

Imports torch first: the library then shares torch's OpenMP runtime, and with it the thread pool.
"""

import ctypes
import logging
import platform
from ctypes import c_float, c_int32, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from kernels.adapters import ADAPTER_DTYPES
from kernels.build import library_path

_log = logging.getLogger(__name__)

DTYPE_CODES = {dtype: code for code, dtype in enumerate(ADAPTER_DTYPES)}

_SIGNATURES = {
    "linear": [c_void_p, c_void_p, c_int32, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int32, c_int32],
    "lora_shrink": [c_void_p] * 4 + [c_int64] * 2 + [c_void_p, c_int64, c_void_p] + [c_int64] * 3 + [c_int32],
    "lora_expand": [c_void_p] * 4
    + [c_int64] * 2
    + [c_void_p, c_int64, c_void_p, c_void_p, c_int32]
    + [c_int64] * 4
    + [c_int32],
    "paged_attention": [c_void_p, c_int32],
    "store_kv": [c_void_p, c_int32, c_int32, c_int32],
    "rms_norm": [c_void_p] * 5 + [c_int32, c_int64, c_int64, c_float, c_int32],
    "silu_and_mul": [c_void_p, c_void_p, c_int32, c_int64, c_int64, c_int32],
}


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None, and one line in the log, when this machine has none or cannot run them."""
    problem = _problem()
    if problem is None:
        try:
            found = ctypes.CDLL(str(library_path()))
        except OSError as error:
            problem = f"the compiled CPU kernels do not load: {error}"
        else:
            for name, arguments in _SIGNATURES.items():
                function = getattr(found, f"loraplex_{name}")
                function.argtypes, function.restype = arguments, None
            return found
    _log.warning("%s; the plain torch kernels are used, several times slower", problem)
    return None


def _problem() -> str | None:
    capability = torch.backends.cpu.get_cpu_capability()
    if platform.machine() != "x86_64" or not capability.startswith("AVX"):
        return f"the CPU kernels need AVX2 and this CPU is {platform.machine()} {capability}"
    if not library_path().exists():
        return "the CPU kernels are not compiled (`make install` does it when there is a C++ compiler)"
    return None


@cache
def vector_lanes() -> int:
    """Floats in the widest vectors of this CPU: 8, or 16 with AVX-512."""
    return 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8


@cache
def kernel(name: str) -> "ctypes._NamedFuncPointer":
    """The function of that operation. Only after `library()` has found it."""
    loaded = library()
    if loaded is None:
        raise RuntimeError("the CPU kernels are not there")
    function: ctypes._NamedFuncPointer = getattr(loaded, f"loraplex_{name}")
    return function


def has_dtype(dtype: torch.dtype, *tensors: Tensor) -> bool:
    """Every tensor is contiguous, on the CPU, and of exactly this dtype: its bytes are read as they are."""
    return all(tensor.is_cpu and tensor.dtype == dtype and tensor.is_contiguous() for tensor in tensors)


def is_plain(*tensors: Tensor | None) -> bool:
    """Every tensor is contiguous, on the CPU, and of a dtype that the kernels convert."""
    for tensor in tensors:
        if tensor is not None and not (tensor.is_cpu and tensor.dtype in DTYPE_CODES and tensor.is_contiguous()):
            return False
    return True
