"""A list of operations that is written down once and runs for other batches.

To write an operation down takes Python 10 to 20 microseconds, as long as many operations of a small step take. So they
are written down once, without running, for two stand-in batches, and compared word by word. A word of the arguments
that is the same for both is a constant: a size of the model, the address of a weight. One that differs is a value of
the batch, or points into what an operation writes. Nothing else can be recorded.

What operations write has so many bytes for each of what the batch has a number of: its tokens, or its rows of logits.
Each kind lies in an arena of its own, in room that is used again as soon as nobody reads it any more.
"""

import ctypes
from bisect import bisect_right, insort
from collections.abc import Iterator, Sequence
from ctypes import c_int64, c_void_p
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from kernels.cpu.launch import Call, NotRecordableError, Operation, kernels

_WORD, _ALIGNMENT = ctypes.sizeof(c_int64), 64


@dataclass(frozen=True, slots=True)
class Take:
    """What was written down for a stand-in batch.

    `values` are the numbers and addresses that are others for each batch: every pair of them, of two takes, is unlike
    every other pair. `counts` are the places among them of numbers of rows: what an operation writes has one of these.
    `results` are what is wanted of it all.
    """

    operations: list[Operation]
    values: tuple[int, ...]
    counts: tuple[int, ...]
    results: tuple[Tensor, ...]


class _Patch(ctypes.Structure):
    _fields_ = (("word", c_void_p), *((name, c_int64) for name in ("source", "count", "per_row", "offset")))


@dataclass(slots=True, eq=False)
class _Buffer:
    """What an operation writes: where it lay in both takes, the stages that need it, its place in its arena.

    `kind` is the place of its number of rows among the counts; `row_bytes` and `place` are bytes a row.
    """

    address: int
    other_address: int
    num_bytes: int
    kind: int
    row_bytes: int
    first: int
    last: int
    place: int = 0


@dataclass(frozen=True, slots=True)
class _Word:
    """A word that differs: its place among all words, what stands there in both takes, and the operation's stage."""

    index: int
    value: int
    other: int
    stage: int


@dataclass(frozen=True, slots=True)
class _Result:
    """`[rows, *shape]`."""

    buffer: _Buffer
    dtype: torch.dtype
    shape: torch.Size

    def of(self, rows: int, arena: Tensor) -> Tensor:
        num_bytes = rows * self.shape.numel() * self.dtype.itemsize
        return arena.narrow(0, rows * self.buffer.place, num_bytes).view(self.dtype).view(rows, *self.shape)


class Recording:
    """Runs what was written down for any batch that has the constants of its two takes. For one thread at a time.

    What constants point to must stay. Raises NotRecordableError when something differs between the takes that is
    neither a value nor an address of what an operation writes.
    """

    def __init__(self, one: Take, other: Take) -> None:
        stages = list(accumulate(int(not operation.side_by_side) for operation in one.operations))
        words = list(_differing(one, other, stages))
        buffers = _Buffers(one, other)
        sources = {pair: source for source, pair in enumerate(zip(one.values, other.values, strict=True))}
        found = {word: buffers.find(word.value, word.other, word.stage) for word in words if _pair(word) not in sources}
        self._results = [
            _Result(buffers.find(tensor.data_ptr(), twin.data_ptr(), stages[-1])[0], tensor.dtype, tensor.shape[1:])
            for tensor, twin in zip(one.results, other.results, strict=True)
        ]
        # Bytes of each arena for one of its count.
        self.row_bytes = buffers.lay_out()
        self._counts = one.counts
        self._words, self._calls = _program(one.operations)
        patches = []
        for word in words:
            patch = sources.get(_pair(word), 0), 0, 0, 0
            if word in found:
                buffer, offset = found[word]
                patch = len(sources) + buffer.kind, one.counts[buffer.kind], buffer.place, offset
            patches.append(_Patch(ctypes.addressof(self._words) + word.index * _WORD, *patch))
        self._patches = (_Patch * len(patches))(*patches)
        self._values = (c_int64 * (len(sources) + len(one.counts)))()

    def run(self, values: Sequence[int], arenas: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The results for a batch: views of `arenas`, which have `row_bytes` for each of their counts, or more."""
        self._values[:] = [*values, *(arena.data_ptr() for arena in arenas)]
        kernels().loraplex_replay(
            *(self._patches, len(self._patches), self._values),
            *(self._calls, len(self._calls), torch.get_num_threads()),
        )
        kinds = (result.buffer.kind for result in self._results)
        return tuple(
            result.of(values[self._counts[kind]], arenas[kind])
            for result, kind in zip(self._results, kinds, strict=True)
        )


class _Buffers:
    """All that the operations write."""

    def __init__(self, one: Take, other: Take) -> None:
        self._counts = [(one.values[count], other.values[count]) for count in one.counts]
        self._addresses: list[int] = []
        self._buffers: dict[int, _Buffer] = {}
        values = set(zip(one.values, other.values, strict=True))
        for operation, twin in zip(one.operations, other.operations, strict=True):
            for tensor, same in zip(operation.tensors, twin.tensors, strict=True):
                if not (isinstance(tensor, Tensor) and isinstance(same, Tensor)):
                    continue
                pair = tensor.data_ptr(), same.data_ptr()
                if pair[0] != pair[1] and pair not in values and self._holding(pair[0]) is None:
                    self._add(tensor, same)

    def _add(self, tensor: Tensor, same: Tensor) -> None:
        address, (kind, row_bytes) = tensor.data_ptr(), self._kind(tensor.nbytes, same.nbytes)
        padded = -(-row_bytes // _ALIGNMENT) * _ALIGNMENT
        self._buffers[address] = _Buffer(address, same.data_ptr(), tensor.nbytes, kind, padded, first=1 << 60, last=0)
        insort(self._addresses, address)

    def _kind(self, num_bytes: int, other_bytes: int) -> tuple[int, int]:
        """What there is a number of, and the bytes for each."""
        for kind, (count, other_count) in enumerate(self._counts):
            row_bytes = num_bytes // count
            if (num_bytes, other_bytes) == (row_bytes * count, row_bytes * other_count):
                return kind, row_bytes
        raise NotRecordableError

    def _holding(self, address: int) -> _Buffer | None:
        index = bisect_right(self._addresses, address)
        buffer = self._buffers[self._addresses[index - 1]] if index else None
        return buffer if buffer and address < buffer.address + buffer.num_bytes else None

    def find(self, value: int, other: int, stage: int) -> tuple[_Buffer, int]:
        """The buffer into which a word of this stage points, and the bytes before it there."""
        buffer = self._holding(value)
        if buffer is None or value - buffer.address != other - buffer.other_address:
            raise NotRecordableError
        buffer.first, buffer.last = min(buffer.first, stage), max(buffer.last, stage)
        return buffer, value - buffer.address

    def lay_out(self) -> tuple[int, ...]:
        """Gives every buffer its place; returns the arenas' sizes. All in bytes a row."""
        kinds = range(len(self._counts))
        return tuple(_lay_out([each for each in self._buffers.values() if each.kind == kind]) for kind in kinds)


def _lay_out(buffers: list[_Buffer]) -> int:
    """Places of buffers of one kind, and the size of their arena."""
    sizes: list[int] = []
    lasts: list[int] = []
    slots: dict[_Buffer, int] = {}
    for buffer in sorted(buffers, key=lambda buffer: buffer.first):
        free = [slot for slot, last in enumerate(lasts) if last < buffer.first]
        if not free:
            free = [len(sizes)]
            sizes.append(0)
            lasts.append(0)
        # the smallest that has room, or the one that grows least
        slot = min(free, key=lambda slot: (sizes[slot] < buffer.row_bytes, abs(sizes[slot] - buffer.row_bytes)))
        sizes[slot], lasts[slot] = max(sizes[slot], buffer.row_bytes), buffer.last
        slots[buffer] = slot
    places = [0, *accumulate(sizes)]
    for buffer, slot in slots.items():
        buffer.place = places[slot]
    return places[-1]


def _pair(word: _Word) -> tuple[int, int]:
    return word.value, word.other


def _differing(one: Take, other: Take, stages: list[int]) -> Iterator[_Word]:
    if len(one.operations) != len(other.operations):
        raise NotRecordableError
    first = 0
    for operation, twin, stage in zip(one.operations, other.operations, stages, strict=True):
        if (operation.function, operation.side_by_side) != (twin.function, twin.side_by_side):
            raise NotRecordableError
        values, others = _words(operation), _words(twin)
        for index, (value, same) in enumerate(zip(values, others, strict=True), start=first):
            if value != same:
                yield _Word(index, value, same, stage)
        first += len(values)


def _words(operation: Operation) -> "ctypes.Array[c_int64]":
    size = ctypes.sizeof(operation.arguments)
    return (c_int64 * (size // _WORD)).from_buffer(operation.arguments)


def _program(operations: list[Operation]) -> tuple["ctypes.Array[c_int64]", "ctypes.Array[Call]"]:
    """The arguments of all operations one after the other, and calls that point to them."""
    parts = [_words(operation) for operation in operations]
    words = (c_int64 * sum(map(len, parts)))(*(word for part in parts for word in part))
    first = ctypes.addressof(words)
    places = accumulate((ctypes.sizeof(part) for part in parts), initial=first)
    calls = [Call(one.function, place, one.side_by_side) for one, place in zip(operations, places, strict=False)]
    return words, (Call * len(calls))(*calls)
