"""Runs compiled operations, one at a time or many in one parallel region.

To wake a thread that sleeps takes tens of microseconds, more than most operations of a small step. So inside
`with together():` operations are written down and run at its end, one after the other on threads that stay awake. Until
then their results are not there: whoever reads one in another way calls `settle()` first.
"""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from kernels.cpu.library import library

# Results that wait hold memory: beyond this much they are computed, and what reads them finds them in a cache.
_MAX_WAITING_BYTES = 8 << 20


class _Call(ctypes.Structure):
    _fields_ = (("add", c_void_p), ("arguments", c_void_p), ("side_by_side", c_int64))


class _Program(threading.local):
    """What this thread has written down."""

    def __init__(self) -> None:
        self.open = False
        self.calls: list[_Call] = []
        # What the addresses in `calls` point into.
        self.kept: list[object] = []
        self.num_bytes = 0
        # Addresses of the results of the last stage.
        self.written: set[int] = set()

    def run(self) -> None:
        if self.calls:
            _run(self.calls)
            self.calls, self.kept, self.num_bytes = [], [], 0
            self.written.clear()


_program = _Program()


@contextmanager
def together() -> Iterator[None]:
    """Operations inside wait for each other's company; all have run when the block ends without an exception."""
    outer, _program.open = _program.open, True
    try:
        yield
        if not outer:
            _program.run()
    finally:
        _program.open = outer
        if not outer:
            _program.calls, _program.kept, _program.num_bytes = [], [], 0
            _program.written.clear()


def settle() -> None:
    """Runs what waits: after it every result is there."""
    _program.run()


def launch(name: str, arguments: ctypes.Structure, out: Tensor, *tensors: object, reads: Tensor | None = None) -> None:
    """Runs an operation, or writes it down.

    `out` and `tensors` are what `arguments` points into. `reads`: the only tensor read that another operation may have
    written; it lets the operation go side by side with those before it that did not write it.
    """
    function, address = _address(name), ctypes.addressof(arguments)
    if not _program.open:
        _run([_Call(function, address, 0)])
        return
    side_by_side = reads is not None and bool(_program.calls) and reads.data_ptr() not in _program.written
    if not side_by_side:
        _program.written.clear()
    _program.written.add(out.data_ptr())
    _program.calls.append(_Call(function, address, side_by_side))
    _program.kept += (arguments, out, *tensors)
    _program.num_bytes += out.nbytes
    if _program.num_bytes > _MAX_WAITING_BYTES:
        _program.run()


def _run(calls: list[_Call]) -> None:
    loaded = library()
    if loaded is None:
        raise RuntimeError("the CPU kernels are not there")
    loaded.loraplex_run((_Call * len(calls))(*calls), len(calls), torch.get_num_threads())


@cache
def _address(name: str) -> int:
    address = ctypes.cast(getattr(library(), f"loraplex_{name}"), c_void_p).value
    assert address is not None
    return address
