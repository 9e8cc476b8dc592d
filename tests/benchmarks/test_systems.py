"""Every system answers PEFT's tokens, the baselines among them, and each baseline does what its name says."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from unittest import mock

import pytest

from benchmarks.baselines.padded_bmm import PaddedBmm
from benchmarks.baselines.systems import DividedSystem, EagerSystem, MergingSystem, PaddedSystem, start
from benchmarks.serving.catalogue import BASELINES
from benchmarks.serving.fixture import page_geometry, pool_bytes, slot_bytes
from benchmarks.serving.outcome import differing
from benchmarks.serving.systems.engine import EngineSystem
from benchmarks.serving.systems.peft import PeftSystem
from benchmarks.serving.workload import BFLOAT16, Workload
from kernels.cpu.recording import Recording
from loraplex.v1 import types_pb2
from tests.benchmarks.conftest import NARROW, NUM_ADAPTERS, Tiny

ROOMY = "64MiB"


@pytest.fixture
def closing() -> Iterator[Callable[[EngineSystem], EngineSystem]]:
    started: list[EngineSystem] = []

    def remember(system: EngineSystem) -> EngineSystem:
        started.append(system)
        return system

    yield remember
    for system in started:
        system.close()


def test_our_engine_answers_what_peft_answers(tiny: Tiny) -> None:
    system = EngineSystem(tiny.fixture, 1, ROOMY)
    outcome = system.run(tiny.workload)
    assert outcome.outputs == tiny.answers
    assert [len(times) for times in outcome.token_seconds] == [len(tokens) for tokens in tiny.answers]
    assert all(list(times) == sorted(times) for times in outcome.token_seconds)
    # Now every adapter is resident, so nobody joins late.
    assert system.run(tiny.workload).outputs == tiny.answers
    assert max(stats.distinct_adapters for stats in system.stats) == NUM_ADAPTERS


def test_adapters_in_bfloat16_are_served_as_peft_serves_them(tiny: Tiny) -> None:
    """As float32 matrices of rounded values; rows are padded to 128 bytes, so a little more than half the bytes."""
    wide = [request for request in tiny.workload.requests if request.adapter + BFLOAT16 in NARROW]
    narrow = Workload("narrow", 2, tuple(replace(request, adapter=request.adapter + BFLOAT16) for request in wide))
    expected = PeftSystem(tiny.fixture, 1).run(narrow, "mixed").outputs
    assert EngineSystem(tiny.fixture, 1, ROOMY).run(narrow).outputs == expected
    for index in NARROW:
        layouts = [tiny.fixture.fetched(number).layout for number in (index, index - BFLOAT16)]
        assert [layout.dtype for layout in layouts] == [types_pb2.DTYPE_BFLOAT16, types_pb2.DTYPE_FLOAT32]
        assert layouts[0].total_bytes < 0.6 * layouts[1].total_bytes


def test_without_adapters_the_answers_are_others(tiny: Tiny) -> None:
    """Otherwise equal tokens would prove nothing."""
    base = EngineSystem(tiny.fixture, 1, ROOMY).run(tiny.workload.of_base())
    assert len(differing(base.outputs, tiny.answers)) > len(tiny.answers) // 2


@pytest.mark.parametrize("how", ["grouped", "alone"])
def test_the_other_modes_of_peft_agree(tiny: Tiny, how: str) -> None:
    assert PeftSystem(tiny.fixture, 1).run(tiny.workload, how).outputs == tiny.answers


@pytest.mark.parametrize("share", [1.0, 0.4])
@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_answers_what_peft_answers(
    tiny: Tiny, closing: Callable[[EngineSystem], EngineSystem], name: str, share: float
) -> None:
    memory, adapter_bytes = pool_bytes(tiny.fixture, tiny.workload, share, 5)
    system = closing(start(name, tiny.fixture, 1, str(memory), adapter_bytes))
    for _ in range(2):
        assert system.run(tiny.workload).outputs == tiny.answers
        system.engine.check_integrity()


@pytest.mark.parametrize(("system", "records"), [(EngineSystem, True), (EagerSystem, False)])
def test_only_the_engine_as_it_serves_is_recorded(tiny: Tiny, system: type[EngineSystem], records: bool) -> None:
    with mock.patch.object(Recording, "run", autospec=True, side_effect=Recording.run) as run:
        assert system(tiny.fixture, 1, ROOMY).run(tiny.workload).outputs == tiny.answers
    assert run.called == records


def test_padded_products_are_really_used(
    tiny: Tiny, closing: Callable[[EngineSystem], EngineSystem], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PaddedBmm, "expand", lambda *arguments: None)
    system = closing(PaddedSystem(tiny.fixture, 1, ROOMY))
    assert system.run(tiny.workload).outputs != tiny.answers


def test_an_engine_that_does_not_call_them_is_not_measured(tiny: Tiny) -> None:
    system = PaddedSystem(tiny.fixture, 1, ROOMY)
    system.close()
    with pytest.raises(RuntimeError, match="did not call the padded products"):
        system.run(tiny.workload)


def test_divided_memory_keeps_kv_out_of_the_adapters_part(tiny: Tiny) -> None:
    memory, adapter_bytes = pool_bytes(tiny.fixture, tiny.workload, 0.3, 4)
    system = DividedSystem(tiny.fixture, 1, str(memory), adapter_bytes, slotted=False)
    system.run(tiny.workload)
    kv_pages = (memory - adapter_bytes) // page_geometry(tiny.fixture).page_bytes
    page_size = page_geometry(tiny.fixture).page_size
    assert 0 < max(stats.context_tokens for stats in system.stats) <= kv_pages * page_size
    assert system.stats[-1].adapter_evictions > 0


def test_reserved_slots_bound_the_adapters_of_a_batch(tiny: Tiny) -> None:
    adapter_bytes = 2 * slot_bytes(tiny.fixture) + 10_000
    system = DividedSystem(tiny.fixture, 1, ROOMY, adapter_bytes, slotted=True)
    assert system.run(tiny.workload).outputs == tiny.answers
    assert max(stats.distinct_adapters for stats in system.stats) <= 2


def test_merging_runs_one_adapter_at_a_time_on_the_base_path(tiny: Tiny) -> None:
    system = MergingSystem(tiny.fixture, 1, ROOMY)
    assert system.run(tiny.workload).outputs == tiny.answers
    assert all(list(stats.lora_ranks) == [] for stats in system.stats)
    base = tiny.workload.of_base()
    assert EngineSystem(tiny.fixture, 1, ROOMY).run(base).outputs == system.run(base).outputs
