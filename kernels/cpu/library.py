"""Loads the compiled kernels and says what they take.

Imports torch first: the library then shares torch's OpenMP runtime, and with it the thread pool.
"""

import ctypes
import logging
import platform
from ctypes import c_int, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from kernels.adapters import ADAPTER_DTYPES
from kernels.build import library_path

_log = logging.getLogger(__name__)

DTYPE_CODES = {dtype: code for code, dtype in enumerate(ADAPTER_DTYPES)}


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
            found.loraplex_run.argtypes, found.loraplex_run.restype = [c_void_p, c_int64, c_int], None
            found.loraplex_replay.argtypes = [c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int]
            found.loraplex_replay.restype = None
            found.loraplex_copy_hashed.argtypes, found.loraplex_copy_hashed.restype = [c_void_p], None
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


def has_dtype(dtype: torch.dtype, *tensors: Tensor) -> bool:
    """Every tensor is contiguous, on the CPU, and of exactly this dtype: its bytes are read as they are."""
    return all(tensor.is_cpu and tensor.dtype == dtype and tensor.is_contiguous() for tensor in tensors)


def is_plain(*tensors: Tensor | None) -> bool:
    """Every tensor is contiguous, on the CPU, and of a dtype that the kernels convert."""
    for tensor in tensors:
        if tensor is not None and not (tensor.is_cpu and tensor.dtype in DTYPE_CODES and tensor.is_contiguous()):
            return False
    return True
