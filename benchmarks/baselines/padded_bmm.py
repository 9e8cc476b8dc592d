"""LoRA by batched matrix products: every adapter padded to the largest rank, every run of tokens to the longest.

This is what a framework without kernels for ragged shapes does (S-LoRA's paper calls it S-LoRA-bmm). It is given what
helps it: padded copies are made once for each adapter and kept; the active ones are moved together, so that a product
reads them where they lie; q, k, v and gate, up share one product; scalings are folded in beforehand.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpu_worker.batching import Chunk
from gpu_worker.model_runner import ModelRunner
from gpu_worker.step_output import StepOutput
from kernels.adapters import AdapterTables, Segments
from kernels.cpu.launch import settle
from kernels.paged_rows import read_rows, row_units

Modules = tuple[int, ...]


@dataclass(slots=True)
class _Stack:
    """Copies of all known adapters for one (layer, modules), the active ones first.

    a: `[capacity, in_features, len(modules) * lora_rank]`, b: `[capacity, lora_rank, out_features]` of each module.
    """

    a: Tensor
    b: list[Tensor]
    filled: set[str]


class PaddedBmm:
    """Stands in for `lora_shrink` and `lora_expand`; `select` says whose rows the next tables hold."""

    def __init__(self, capacity: int = 64, lora_rank: int = 64) -> None:
        self._capacity = capacity
        self._rank = lora_rank
        self._stacks: dict[tuple[int, Modules], _Stack] = {}
        # Adapters by place in every stack; the first of them are those of the batch.
        self._order: list[str] = []
        self._places: dict[str, int] = {}
        self._selected: list[str] = []
        self._layout: tuple[Segments, Tensor, Tensor, slice] | None = None
        self.calls = 0

    def select(self, versions: Sequence[str]) -> None:
        """The adapters of the next batch, in the order of its tables."""
        self._selected = list(versions)
        self._layout = None
        for version in versions:
            if version not in self._places:
                self._places[version] = len(self._order)
                self._order.append(version)
        if len(self._order) > self._capacity:
            raise ValueError(f"{len(self._order)} adapters; there is room for {self._capacity}")
        wanted = set(versions)
        outside = [self._places[version] for version in versions if self._places[version] >= len(versions)]
        inside = [place for place in range(len(versions)) if self._order[place] not in wanted]
        for one, other in zip(outside, inside, strict=True):
            self._swap(one, other)

    def shrink(self, x: Tensor, tables: AdapterTables, segments: Segments, layer: int, modules: Modules) -> Tensor:
        """`[num_adapters, longest run, len(modules) * lora_rank]`; empty when no adapter has any of the modules."""
        # The engine's own operations may still be on their way.
        settle()
        self.calls += 1
        if not bool(tables.lora_rank[:, layer, list(modules)].any()):
            return torch.empty(0)
        stack = self._stack(x.shape[1], tables, layer, modules)
        index, _, _ = self._padded(segments)
        return torch.bmm(x[index], stack.a[: len(self._selected)])

    def expand(
        self,
        shrunk: Tensor,
        tables: AdapterTables,
        segments: Segments,
        layer: int,
        modules: Modules,
        in_features: int,
        out_features: tuple[int, ...],
        out: Tensor,
    ) -> None:
        if not shrunk.numel():
            return
        settle()
        stack = self._stack(in_features, tables, layer, modules, out_features)
        _, place, tokens = self._padded(segments)
        columns = out.split_with_sizes(out_features, dim=1)
        narrow = shrunk.split_with_sizes([self._rank] * len(modules), dim=2)
        for part, b, column in zip(narrow, stack.b, columns, strict=True):
            wide = torch.bmm(part, b[: len(self._selected)])
            column[tokens] += wide.flatten(0, 1)[place]

    def _padded(self, segments: Segments) -> tuple[Tensor, Tensor, slice]:
        """Token of each (adapter, place in its run), place of each token among them all, and the tokens meant."""
        if self._layout is None or self._layout[0] is not segments:
            starts, rows = segments.starts.tolist(), segments.adapter.tolist()
            longest = max(starts[i + 1] - starts[i] for i, row in enumerate(rows) if row >= 0)
            index = torch.zeros(len(self._selected), longest, dtype=torch.int64)
            place = []
            for i, row in enumerate(rows):
                if row < 0:
                    continue
                slot, length = self._places[self._selected[row]], starts[i + 1] - starts[i]
                index[slot, :length] = torch.arange(starts[i], starts[i + 1])
                place.append(slot * longest + torch.arange(length))
            first = starts[next(i for i, row in enumerate(rows) if row >= 0)]
            self._layout = segments, index, torch.cat(place), slice(first, starts[-1])
        return self._layout[1:]

    def _stack(
        self, in_features: int, tables: AdapterTables, layer: int, modules: Modules, outs: tuple[int, ...] = ()
    ) -> _Stack:
        key = layer, modules
        stack = self._stacks.get(key)
        if stack is None:
            a = torch.zeros(self._capacity, in_features, len(modules) * self._rank)
            stack = self._stacks[key] = _Stack(a, [], set())
        if outs and not stack.b:
            stack.b = [torch.zeros(self._capacity, self._rank, out) for out in outs]
            stack.filled.clear()
        for row, version in enumerate(self._selected):
            if version not in stack.filled:
                self._fill(stack, tables, row, self._places[version], layer, modules, in_features, outs)
                if outs:
                    stack.filled.add(version)
        return stack

    def _fill(
        self,
        stack: _Stack,
        tables: AdapterTables,
        row: int,
        place: int,
        layer: int,
        modules: Modules,
        in_features: int,
        outs: tuple[int, ...],
    ) -> None:
        """Copies one adapter out of its pages, padded with zeros."""
        for number, module in enumerate(modules):
            lora_rank = int(tables.lora_rank[row, layer, module])
            if not lora_rank:
                continue
            unit = int(tables.start_unit[row, layer, module])
            a = read_rows(tables, row, unit, lora_rank, in_features, torch.float32)
            first = number * self._rank
            stack.a[place, :, first : first + lora_rank] = a.T
            if outs:
                unit += lora_rank * row_units(in_features, torch.float32)
                b = read_rows(tables, row, unit, lora_rank, outs[number], torch.float32)
                stack.b[number][place, :lora_rank] = b * tables.scaling[row, layer, module]

    @torch.inference_mode()
    def _swap(self, one: int, other: int) -> None:
        self._order[one], self._order[other] = self._order[other], self._order[one]
        self._places[self._order[one]], self._places[self._order[other]] = one, other
        for stack in self._stacks.values():
            for tensor in (stack.a, *stack.b):
                kept = tensor[one].clone()
                tensor[one] = tensor[other]
                tensor[other] = kept


class PaddedRunner(ModelRunner):
    """Tells the products whose adapters the batch has; digests are immutable, so a copy is never stale."""

    bmm: PaddedBmm

    def launch(self, chunks: Sequence[Chunk], step: int) -> Callable[[], StepOutput]:
        self.bmm.select(sorted({chunk.sequence.adapter_version for chunk in chunks} - {""}))
        return super().launch(chunks, step)
