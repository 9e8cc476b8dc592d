"""Recorded layers give the bits of the decoder that they were recorded from, for every batch."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gpu_worker.batch import Forward, ForwardBatch
from gpu_worker.models import Decoder, load_model, recorded
from gpu_worker.models.recorded import RecordedDecoder
from kernels import dispatch
from kernels.adapters import AdapterTables, Segments
from kernels.cpu import recording, tables
from kernels.cpu.recording import Recording
from tests.gpu_worker.models.checkpoints import VARIANTS, draw_tokens, random_model, save
from tests.gpu_worker.models.lora_bench import Bench, build_bench, mixed_batch
from tests.gpu_worker.models.stepper import Running, Stepper

RECORDABLE = [variant for variant in VARIANTS if not variant.startswith("qwen3")]
# At most so many tokens of a sequence in each step: prompts, chunks beside decodes, decodes, all at once.
SCHEDULES = {"chunks": [7, 7, 1, 16, 1], "decodes": [1] * 6, "whole": [33]}


class Recorded(RecordedDecoder):
    """Every element of the arenas is NaN before a step, and the decoder runs no batch itself."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(NeverItself(decoder.config, decoder.weights))

    def _rooms(self, recording: Recording, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        first, second = super()._rooms(recording, batch)
        return first.fill_(0xFF), second.fill_(0xFF)


class NeverItself(Decoder):
    def forward(self, batch: ForwardBatch) -> Tensor:
        raise AssertionError("the decoder ran a batch itself")


class OnlyItself(Decoder):
    """Counts the batches that it runs."""

    batches = 0

    def forward(self, batch: ForwardBatch) -> Tensor:
        self.batches += 1
        return super().forward(batch)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return build_bench("llama-biases", tmp_path_factory.mktemp("model"))


def steps_of(
    decoder: Decoder, forward: Forward, schedule: Sequence[int], tables: AdapterTables | None
) -> tuple[list[Tensor], dict[tuple[str, str], int]]:
    """Logits of a mixed batch and the pages that it wrote; and the operations that were counted."""
    sequences = mixed_batch() if tables else [Running(sequence.tokens) for sequence in mixed_batch()]
    stepper = Stepper(decoder, sequences, tables)
    stepper.decoder = forward
    before = dispatch.calls.copy()
    for tokens in schedule:
        stepper.step([min(tokens, len(each.tokens) - each.num_computed) for each in stepper.sequences])
    logits = [rows for sequence in stepper.sequences for rows in sequence.logits]
    return [*logits, stepper.kv_pages.nan_to_num(nan=0.0)], dict(dispatch.calls - before)


def is_same(decoder: Decoder, forward: Forward, schedule: Sequence[int], tables: AdapterTables | None) -> bool:
    """Whether `forward` gives and counts what `decoder` does."""
    tensors, counts = steps_of(decoder, forward, schedule, tables)
    wanted, wanted_counts = steps_of(decoder, decoder, schedule, tables)
    return counts == wanted_counts and all(map(torch.equal, tensors, wanted))


@pytest.mark.parametrize("variant", RECORDABLE)
def test_every_family_gives_the_bits_of_the_decoder(variant: str, tmp_path: Path) -> None:
    bench = build_bench(variant, tmp_path)
    assert is_same(bench.decoder, Recorded(bench.decoder), SCHEDULES["chunks"], bench.tables)


@pytest.mark.parametrize("threads", [1, 2], ids=["1-thread", "2-threads"])
@pytest.mark.parametrize("with_adapters", [True, False], ids=["adapters", "base"])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_every_kind_of_batch_gives_the_bits_of_the_decoder(
    schedule: list[int], with_adapters: bool, threads: int, bench: Bench
) -> None:
    torch.set_num_threads(threads)
    try:
        tables = bench.tables if with_adapters else None
        assert is_same(bench.decoder, Recorded(bench.decoder), schedule, tables)
    finally:
        torch.set_num_threads(1)


def test_batches_with_and_without_adapters_and_other_ranks_take_turns(bench: Bench) -> None:
    forward = Recorded(bench.decoder)
    for adapters in (bench.tables, None, replace(bench.tables, max_lora_rank=40), bench.tables, None):
        assert is_same(bench.decoder, forward, [3, 1], adapters)


def test_other_weights_are_not_those_that_were_recorded(bench: Bench) -> None:
    decoder = Decoder(bench.decoder.config, bench.decoder.weights)
    forward = RecordedDecoder(decoder)
    before = steps_of(decoder, forward, [5], bench.tables)[0]
    decoder.weights = replace(decoder.weights, layers=decoder.weights.layers[::-1])
    assert is_same(decoder, forward, [5], bench.tables)
    assert not torch.equal(steps_of(decoder, forward, [5], bench.tables)[0][0], before[0])


@pytest.mark.parametrize(("variant", "dtype"), [("qwen3", "float32"), ("llama", "bfloat16")])
def test_what_needs_torch_between_two_operations_is_left_to_the_decoder(
    variant: str, dtype: str, tmp_path: Path
) -> None:
    loaded = load_model(save(random_model(variant), tmp_path), dtype, "cpu")
    decoder = OnlyItself(loaded.config, loaded.weights)
    assert is_same(loaded, RecordedDecoder(decoder), [4, 1], None)
    assert decoder.batches == 2


def test_references_are_left_to_the_decoder(bench: Bench) -> None:
    decoder = OnlyItself(bench.decoder.config, bench.decoder.weights)
    forward = RecordedDecoder(decoder)
    with dispatch.force("reference"):
        assert is_same(bench.decoder, forward, [4, 1], bench.tables)
    assert decoder.batches == 2
    assert is_same(bench.decoder, forward, [4, 1], bench.tables)
    assert decoder.batches == 2


def two_batches(bench: Bench) -> tuple[ForwardBatch, ForwardBatch]:
    """A batch, and one of the same sizes with other contents everywhere."""
    sequences = [Running(draw_tokens(20, seed), adapter) for seed, adapter in enumerate((-1, 0, 4, 4))]
    stepper = Stepper(bench.decoder, sequences, bench.tables)
    stepper.step([12, 9, 11, 10])
    some = stepper.batch([2, 3, 1, 4], torch.tensor([1, 4, 5, 8, 9]))
    one = replace(some, kv_pages=stepper.kv_pages.nan_to_num(nan=0.5))
    assert one.adapters is not None
    swapped = torch.tensor([0, 4, 5, 8, 10], dtype=torch.int32)
    other = replace(
        one,
        token_ids=one.token_ids.flip(0),
        logit_rows=one.logit_rows.flip(0),
        positions=one.positions.flip(0),
        slot_mapping=one.slot_mapping.flip(0),
        page_table=one.page_table.flip(0).contiguous(),
        query_start=swapped,
        context_lens=one.context_lens - 1,
        segments=Segments(torch.tensor([0, 1, 6, 10], dtype=torch.int32), one.segments.adapter.flip(0).contiguous()),
        adapters=replace(one.adapters, scaling=one.adapters.scaling * 2),
    )
    return one, other


NUMBERS = {"tokens": 0, "logits": 1, "sequences": 2, "pages": 3, "segments": 12}
ADDRESSES = {"token ids": 4, "logit rows": 5, "positions": 6, "slots": 7, "page table": 8}
ADDRESSES |= {"query start": 9, "context lens": 10, "adapters": 11, "segment starts": 13, "segment adapters": 14}


@pytest.mark.parametrize("name", [*NUMBERS, *ADDRESSES])
def test_a_value_that_is_not_the_batchs_own_is_noticed(
    name: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, other = two_batches(bench)
    assert other.adapters is not None
    forward = Recorded(bench.decoder)
    wanted = bench.decoder.forward(replace(batch, kv_pages=batch.kv_pages.clone()))
    assert torch.equal(forward.forward(batch), wanted)
    values_of = recorded._values
    # the adapters' structure lives as long as these are the last tables
    foreign, tables_of_other = values_of(other.token_ids, other), tables.tensors(other.adapters, other.segments)

    def values(token_ids: Tensor, batch: ForwardBatch) -> tuple[int, ...]:
        own = list(values_of(token_ids, batch))
        index = (NUMBERS | ADDRESSES)[name]
        own[index] = own[index] - 1 if name in NUMBERS else foreign[index]
        return tuple(own)

    monkeypatch.setattr(recorded, "_values", values)
    assert not torch.equal(forward.forward(batch), wanted)
    assert len(foreign) == len(NUMBERS | ADDRESSES)
    assert tables_of_other


def test_results_that_share_their_room_are_noticed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    lay_out = recording._Buffers.lay_out

    def all_at_the_start(buffers: recording._Buffers) -> tuple[int, ...]:
        size = lay_out(buffers)
        for buffer in buffers._buffers.values():
            buffer.place = 0
        return size

    monkeypatch.setattr(recording._Buffers, "lay_out", all_at_the_start)
    assert not is_same(bench.decoder, Recorded(bench.decoder), [3], bench.tables)
