"""The one place that chooses between a reference and a kernel, and counts what ran.

A public function asks `use_triton(op, tensor)`, then `use_cpu(op, supported)`; `supported` says whether the compiled
kernel takes these tensors. Tensors on a GPU go to Triton where it is installed. Any backend can be forced, by
`with force("reference")` or by the environment variable LORAPLEX_KERNELS; Triton takes tensors on the CPU only when
forced and in its interpreter (TRITON_INTERPRET=1), which is for tests.
"""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

from torch import Tensor

from kernels.cpu.launch import settle
from kernels.cpu.library import library

REFERENCE, CPU, TRITON = "reference", "cpu", "triton"
CPU_BACKENDS = (REFERENCE, CPU)
BACKENDS = (*CPU_BACKENDS, TRITON)
LIBRARIES = ("flash_attn", "flashinfer")

# (op, backend) -> calls in this process
calls: Counter[tuple[str, str]] = Counter()


def calls_by_backend() -> dict[str, int]:
    """Operations that ran in this process, by backend."""
    return {backend: sum(count for (_, ran), count in calls.items() if ran == backend) for backend in BACKENDS}


def _checked(backend: str) -> str:
    if backend not in ("", *BACKENDS):
        raise ValueError(f"LORAPLEX_KERNELS is {backend!r}; known: {', '.join(BACKENDS)}")
    return backend


def _checked_attention(name: str) -> str:
    if name not in ("", TRITON, *LIBRARIES):
        raise ValueError(f"LORAPLEX_ATTENTION is {name!r}; known: {', '.join((TRITON, *LIBRARIES))}")
    return name


_forced = _checked(os.environ.get("LORAPLEX_KERNELS", ""))
_attention = _checked_attention(os.environ.get("LORAPLEX_ATTENTION", ""))


@contextmanager
def force(backend: str) -> Iterator[None]:
    """Every operation inside runs on `backend`, or raises RuntimeError when that cannot be."""
    global _forced
    before, _forced = _forced, _checked(backend)
    try:
        yield
    finally:
        _forced = before


def available() -> bool:
    """Whether an operation on the CPU would run compiled, as far as the machine and a forced backend decide it."""
    return _forced in ("", CPU) and library() is not None


@cache
def installed(package: str) -> bool:
    return find_spec(package) is not None


def attention() -> str:
    """What LORAPLEX_ATTENTION names; empty = the first choice."""
    return _attention


def attention_libraries() -> tuple[str, ...]:
    """Installed libraries that attention on a GPU may use, first choice first; forcing any backend leaves them out.

    FlashAttention comes first: it takes pages of 256 tokens only, so whoever has these has asked for it.
    """
    if _forced:
        return ()
    return tuple(name for name in LIBRARIES if _attention in ("", name) and installed(name))


def use_triton(op: str, tensor: Tensor, *, by_default: bool = True) -> bool:
    """True = run the Triton kernel; `tensor` says where the operation's tensors are.

    by_default: it is this operation's first choice on a GPU, and not only when forced.
    """
    if _forced == TRITON:
        if not installed("triton"):
            raise RuntimeError(f"the Triton kernel of {op} is forced and triton is not installed")
        if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError(f"the Triton kernel of {op} is forced and its tensors are on {tensor.device}")
    elif _forced or not by_default or not tensor.is_cuda or not installed("triton"):
        return False
    calls[op, TRITON] += 1
    return True


def use_cpu(op: str, supported: bool) -> bool:
    """True = run the compiled kernel, False = run the reference."""
    if supported and available():
        calls[op, CPU] += 1
        return True
    if _forced == CPU:
        why = "it does not take these tensors" if supported is False else "it is not there"
        raise RuntimeError(f"the compiled kernel of {op} is forced and {why}")
    calls[op, REFERENCE] += 1
    # It reads what compiled operations wrote.
    settle()
    return False
