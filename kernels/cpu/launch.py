"""Runs compiled operations, one at a time or many in one parallel region, or only writes them down.

To wake a thread that sleeps takes tens of microseconds, more than most operations of a small step. So inside
`with together():` operations are written down and run at its end, one after the other on threads that stay awake. Until
then their results are not there: whoever reads one in another way calls `settle()` first.
"""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_int64, c_void_p
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from kernels.cpu.library import library

# Results that wait hold memory: beyond this much they are computed, and what reads them finds them in a cache.
_MAX_WAITING_BYTES = 8 << 20


class Call(ctypes.Structure):
    _fields_ = (("add", c_void_p), ("arguments", c_void_p), ("side_by_side", c_int64))


@dataclass(frozen=True, slots=True)
class Operation:
    """What was written down of an operation; `tensors` are those that its arguments point into."""

    function: int
    side_by_side: bool
    arguments: ctypes.Structure
    tensors: tuple[object, ...]


class NotRecordableError(Exception):
    """Something between two operations reads what they compute."""


class _Program(threading.local):
    """What this thread has written down."""

    def __init__(self) -> None:
        self.open = False
        # Nothing of it is to run.
        self.dry = False
        self.operations: list[Operation] = []
        self.num_bytes = 0
        # Addresses of the results of the last stage.
        self.written: set[int] = set()

    def run(self) -> None:
        if self.dry:
            raise NotRecordableError
        if self.operations:
            _run(self.operations)
            self.clear()

    def clear(self) -> None:
        self.operations, self.num_bytes = [], 0
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
            _program.clear()


@contextmanager
def written_down() -> Iterator[list[Operation]]:
    """Compiled operations inside are not run: the list has them in order.

    Raises NotRecordableError where something must `settle()`, as every reference operation does.
    """
    _program.open = _program.dry = True
    try:
        yield _program.operations
    finally:
        _program.open = _program.dry = False
        _program.clear()


def settle() -> None:
    """Runs what waits: after it every result is there."""
    _program.run()


def launch(name: str, arguments: ctypes.Structure, out: Tensor, *tensors: object, reads: Tensor | None = None) -> None:
    """Runs an operation, or writes it down.

    `out` and `tensors` are what `arguments` points into. `reads`: the only tensor read that another operation may have
    written; it lets the operation go side by side with those before it that did not write it.
    """
    side_by_side = reads is not None and bool(_program.operations) and reads.data_ptr() not in _program.written
    operation = Operation(_address(name), side_by_side, arguments, (out, *tensors))
    if not _program.open:
        _run([operation])
        return
    if not side_by_side:
        _program.written.clear()
    _program.written.add(out.data_ptr())
    _program.operations.append(operation)
    _program.num_bytes += out.nbytes
    if _program.num_bytes > _MAX_WAITING_BYTES and not _program.dry:
        _program.run()


def _run(operations: list[Operation]) -> None:
    calls = [Call(one.function, ctypes.addressof(one.arguments), one.side_by_side) for one in operations]
    kernels().loraplex_run((Call * len(calls))(*calls), len(calls), torch.get_num_threads())


def kernels() -> ctypes.CDLL:
    """The library. Raises RuntimeError when it is not there."""
    loaded = library()
    if loaded is None:
        raise RuntimeError("the CPU kernels are not there")
    return loaded


@cache
def _address(name: str) -> int:
    address = ctypes.cast(getattr(library(), f"loraplex_{name}"), c_void_p).value
    assert address is not None
    return address
